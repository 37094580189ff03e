"""The command line of the scripts, with YAML below it, and how a script ends: in one line."""

import difflib
import itertools
import os
import re
import signal
import sys
from argparse import Action
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from types import FrameType
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, get_args, get_type_hints

import docstring_parser
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, DefaultHelpFormatter

from run.errors import UserError

# What other scripts call these options, where difflib sees no likeness.
ALIASES = {
    "lr": "learning_rate", "bs": "batch_size", "wd": "weight_decay", "arch": "model",
    "temp": "temperature", "tau": "temperature",
}  # fmt: skip
# What jsonargparse says of a number where a list belongs.
LIST_EXPECTED = re.compile(
    r"""Parser key "(\w+)":.*Expected a <class 'list'>.*Given value: (\S+)""", re.DOTALL
)
INTERRUPTED = 128 + signal.SIGINT  # as shells count a program that a signal ended


class Options(Protocol):
    """A dataclass of options, each of which its docstring describes; or of such dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""


Kind = TypeVar("Kind", bound=Options)


class _Help(DefaultHelpFormatter):
    """Shows a boolean as the two flags that it is."""

    def _format_action_invocation(self, action: Action) -> str:
        if isinstance(action, ActionYesNo):
            return ", ".join(action.option_strings)
        return str(super()._format_action_invocation(action))


class _Parser(ArgumentParser):
    """Says what is wrong in one line, without the usage of every option before it."""

    accepted: Iterable[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2."""
        message = message.replace("invalid _boolean_type value", "true or false is accepted, not")
        if found := LIST_EXPECTED.search(message):
            message = f"--{found[1]} {found[2]}: a list is accepted, such as [{found[2]}]"
        if message.startswith("Unexpected config:"):
            message = "--config: the file must have a line such as 'epochs: 10' for each option"
        # argparse lists the unknown words of the command line, jsonargparse quotes a key of YAML.
        _, _, unknown = message.partition("nrecognized arguments: ")
        words = [word for word in unknown.split() if word.startswith("-")]
        words += re.findall(r"['\"](\w+)['\"] is not (?:accepted|expected)", message)
        hints = [hint for word in words if (hint := _suggestion(word, self.accepted))]
        print(
            " ".join(["error:", *message.split(), *hints, "(--help lists all options)"]),
            file=sys.stderr,
        )
        raise SystemExit(2)


def _suggestion(word: str, accepted: Iterable[str]) -> str | None:
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    close = [option for option in accepted if option == ALIASES.get(name)]
    close = close or difflib.get_close_matches(name, accepted, n=1)
    return f"(did you mean --{close[0]}?)" if close else None


def parse(kind: type[Kind], argv: list[str] | None, *, prog: str, description: str) -> Kind:
    """Read options; unknown, malformed and contradictory ones exit with code 2."""
    parser = _Parser(
        prog=prog,
        usage=f"python {prog} [--config FILE] [--OPTION VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    rooms = _rooms(kind)
    parser.accepted = [
        "config",
        *(option.name for room in rooms.values() for option in fields(room)),
    ]
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file of options; the command line wins wherever it stands.",
    )
    for room in rooms.values():
        _add_room(parser, room)
    arguments = _config_files_first(sys.argv[1:] if argv is None else argv)
    values = vars(parser.parse_args(arguments))
    for room in rooms.values():
        types = get_type_hints(room)
        for option in fields(room):
            if values[option.name] is None and type(None) not in get_args(types[option.name]):
                parser.error(f"--{option.name} null: it needs a value")
    made = {
        name: room(**{option.name: values[option.name] for option in fields(room)})
        for name, room in rooms.items()
    }
    options = made[""] if "" in made else kind(**made)
    if mistakes := options.mistakes():
        parser.error("; ".join(mistakes))
    return options


def _rooms(kind: type[Options]) -> dict[str, type[Any]]:
    """The dataclasses of a dataclass by name; of one without any it alone, without a name."""
    types = get_type_hints(kind)
    rooms = {field.name: types[field.name] for field in fields(kind)}
    return rooms if all(map(is_dataclass, rooms.values())) else {"": kind}


def _add_room(parser: ArgumentParser, room: type[Any]) -> None:
    """Add the options of a dataclass, in a group that its docstring gives the title."""
    doc = docstring_parser.parse(room.__doc__ or "")
    described = {
        param.arg_name: " ".join((param.description or "").split()) for param in doc.params
    }
    group = parser.add_argument_group((doc.short_description or "").rstrip("."))
    types = get_type_hints(room)
    for option in fields(room):
        default = option.default
        if option.default_factory is not MISSING:
            default = option.default_factory()
        how: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
        how["help"] = described[option.name]
        if types[option.name] is bool:
            how |= {"action": ActionYesNo(no_prefix="no_"), "nargs": "?"}
        elif types[option.name] == list[str]:
            how |= {"type": str, "nargs": "+"}
        else:
            how["type"] = types[option.name]
        group.add_argument(f"--{option.name}", **how)


def _config_files_first(argv: list[str]) -> list[str]:
    # jsonargparse lets the later of two values win; with every --config moved to the front that
    # is always the one typed on the command line.
    first: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config":
            first += [word, *itertools.islice(words, 1)]
        elif word.startswith("--config="):
            first.append(word)
        else:
            others.append(word)
    return first + others


def run_script(main: Callable[[], Any], *, if_interrupted: str = "") -> None:
    """Call a script's main; a user's mistake is one line and exit code 1, Ctrl-C exit code 130.

    Args:
        if_interrupted: what the user may do after Ctrl-C, printed then.
    """
    try:
        with _interrupted_once():
            main()
            sys.stdout.flush()
    except UserError as error:
        # An error raised in a DataLoader worker arrives wrapped in that worker's traceback.
        print("error:", str(error).rsplit("UserError: ", 1)[-1].strip(), file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # Nobody reads on (`| head`); what is still buffered must not fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted {if_interrupted}".rstrip(), file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """Have the first Ctrl-C raise KeyboardInterrupt and a second end the process at once.

    After the first it stays so: what cleans up, and Python itself on its way out, would print a
    traceback at the second.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # it is ignored, as in the background, or somebody else's
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    raise KeyboardInterrupt
