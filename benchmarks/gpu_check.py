"""Measures everything that needs a GPU, in minutes: is it right, how fast, where does the time go.

python benchmarks/gpu_check.py                                  facts, speed, counters, behaviour: 9 minutes
python benchmarks/gpu_check.py cases driver sanitizers choices  is all of it right, and training: 9 minutes
python benchmarks/gpu_check.py tiles                            which tiles are the fastest: 7 minutes
python benchmarks/gpu_check.py report FOLDER...                 README's table, docs/gpu.md's section, pictures
python benchmarks/gpu_check.py rehearse                         without a card: compile all that would be launched

It needs no install. Rows are appended to rows.jsonl in the output folder as they are found, and the
summary comes last, also after SIGTERM: of each stage the last run in that folder. A stage that raises,
hangs or breaks the device does not end the run. Without a GPU it says what it would do and exits 0;
where something was wrong in this run it exits 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

# A bare clone is enough.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.journal import Journal, read_rows
from gpu.place import Place, Row, first_line
from gpu.runner import Stage, run_stages
from gpu.summary import BAD, summary

BENCHMARKS = Path(__file__).resolve().parent
STAGES = (
    Stage("facts", 70),
    Stage("speed", 300),
    Stage("tiles", 400),
    Stage("counters", 50),
    Stage("behaviour", 80),
    Stage("choices", 40),
    Stage("cases", 240, in_parallel=True),
    Stage("driver", 140, patience_s=140),
    Stage("sanitizers", 80),
)
FIRST_COMMAND = ("facts", "speed", "counters", "behaviour")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["report"], ["rehearse"]):
        command = importlib.import_module(f"gpu.{argv[0]}")
        return int(command.main(argv[1:]))
    parser = _make_parser()
    args = parser.parse_args(argv)
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in args.stages if name not in known]:
        parser.error(f"no stage {unknown[0]!r}: the stages are {', '.join(known)}")
    if args.wheels and not any(args.wheels.glob("*.whl")):
        parser.error(f"--wheels {args.wheels}: a folder that holds .whl files is accepted")
    stages = [stage for stage in STAGES if stage.name in (args.stages or FIRST_COMMAND)]
    if args.device == "cuda" and not _has_cuda():
        print("There is no CUDA device: nothing was run. With one, this would run")
        for stage in stages:
            print(f"  - {stage.name}, {stage.seconds:.0f} s: {_first_sentence(stage.name)}")
        return 0
    return run(args, stages)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(names))
    default = BENCHMARKS.parent / "runs" / "gpu"
    parser.add_argument(
        "--output-dir", type=Path, default=default, metavar="DIR", help="default: runs/gpu"
    )
    parser.add_argument(
        "--minutes", type=float, help="time for all stages together; default: the sum of theirs"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="a folder of .whl files, unpacked for this run"
    )
    parser.add_argument(
        "--data-root",
        default="",
        metavar="DIR",
        help="Fashion-MNIST, for the driver stage; default: digits",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="processes that compile or compare at once; default: one less than cores",
    )
    rehearsal = parser.add_argument_group("to rehearse without a card")
    rehearsal.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    rehearsal.add_argument("--backend", default="triton")
    rehearsal.add_argument("--tiny", action="store_true", help="small sizes")
    return parser


def run(args: argparse.Namespace, stages: Sequence[Stage]) -> int:
    """Run the stages; whatever ends the run, the summary of what there is comes last."""
    folder = args.output_dir.resolve()
    journal = Journal(folder)
    num_former = len(read_rows([folder]))
    place = Place(
        device=args.device,
        backend=args.backend,
        is_tiny=args.tiny,
        num_jobs=args.jobs,
        folder=str(folder),
        data_root=args.data_root,
    )
    code = 0
    with tempfile.TemporaryDirectory() as site:
        try:
            for name in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(name, _stop)
            journal.append({"stage": "run", "argv": sys.argv[1:], **_origin(args.device)})
            for failure in _make_importable(args.wheels, site):
                journal.append({"stage": "run", **failure})
            run_stages(stages, place, journal, args.minutes, lambda: _write_summary(folder))
        except (KeyboardInterrupt, _Stopped) as stopped:
            code = 130 if isinstance(stopped, KeyboardInterrupt) else 143
            journal.append({"stage": "run", "event": "stopped"})
    journal.close()
    text = _write_summary(folder)
    print(text, flush=True)
    is_bad = any(row.get("status") in BAD for row in read_rows([folder])[num_former:])
    return code or int(is_bad)


class _Stopped(BaseException):
    """The run was asked to end."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def _write_summary(folder: Path) -> str:
    text = summary(read_rows([folder]))
    (folder / "summary.txt").write_text(text + "\n")
    return text


def _make_importable(wheels: Path | None, site: str) -> list[Row]:
    """Unpack wheels where every process finds them; answer with those that cannot be unpacked."""
    failed = []
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        except Exception as failure:  # a damaged wheel is named, the rest goes on
            failed.append({"item": wheel.name, "status": "failed", "detail": first_line(failure)})
    paths = [os.environ.get("PYTHONPATH"), site]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return failed


def _origin(device: str) -> dict[str, str]:
    """The machine, the versions and the commit that all rows of the run share."""
    from importlib import metadata

    from measuring.machine import describe_machine, query_nvidia_smi

    found = describe_machine("cpu")
    for package in ("triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device == "cuda":  # without a context of this process on the card
        card = query_nvidia_smi("name,driver_version")
        found["gpu"] = card.get("name", "unknown GPU")
        found["driver"] = card.get("driver_version", "not here")
    return found


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _first_sentence(name: str) -> str:
    """Of a stage's file, read and not imported."""
    text = (BENCHMARKS / "gpu" / f"{name}.py").read_text()
    return text.split('"""')[1].split("\n")[0].rstrip(".").rstrip(":")


if __name__ == "__main__":
    sys.exit(main())
