"""README and docs/: every program runs, and every command's options exist.

test_train_docs.py runs the commands of train/ on folders of images, and the programs of
docs/training.md, evaluation.md and export.md; integrations/ runs docs/frameworks.md with the libraries
that it names.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {"training.md", "evaluation.md", "export.md", "frameworks.md"}


def blocks(page: Path, language: str) -> list[str]:
    """What stands between the fences of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def names_of_the_reader() -> dict[str, object]:
    """What a page may take for granted: an encoder, images, labels and embeddings."""
    return {
        "encoder": torch.nn.Linear(16, 8),
        "images": torch.randn(32, 16),
        "labels": torch.arange(32) % 4,
        "features": torch.nn.functional.normalize(torch.randn(32, 2, 8), dim=2),
        "embeddings": torch.randn(32, 8),
        "image_features": torch.randn(32, 8),
        "text_features": torch.randn(32, 8),
        "logit_scale": torch.tensor(14.3),
    }


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in RUN_ELSEWHERE and blocks(page, "python")],
    ids=lambda page: page.stem,
)
def test_every_program_runs(page):
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names_of_the_reader())


def test_every_option_of_a_command_exists():
    unknown = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                script = next((word for word in words if word.endswith(".py")), None)
                if script is None:
                    continue
                text = "".join(path.read_text() for path in sources_of(ROOT / script))
                unknown += [
                    (page.name, script, word)
                    for word in words[words.index(script) + 1 :]
                    if word.startswith("--") and not is_option(word, text)
                ]
    assert not unknown


def sources_of(script: Path) -> list[Path]:
    """Where a script's options may be defined."""
    return (
        [script, *sorted((ROOT / "train").rglob("*.py"))] if "train" in script.parts else [script]
    )


def is_option(word: str, source: str) -> bool:
    """Whether a script's source defines the option, as a field or as an argument."""
    name = word[2:].partition("=")[0].removeprefix("no_")
    return f"    {name}: " in source or f'"{word}"' in source or name == "config"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
