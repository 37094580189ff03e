"""Evaluated runs side by side: a table in Markdown, to read, and in CSV, to compute with."""

import csv
import io
from pathlib import Path
from typing import Any

from run.atomic_write import replace_text
from run.errors import UserError

MARKDOWN, CSV = "comparison.md", "comparison.csv"
ABOUT = ("run", "method", "classifier")
CORRUPTED = "corrupted top-1"
# The columns before and after those of transfer: where a run's results have the number.
BEFORE = {
    "top-1": ("classification", "top1"),
    "top-5": ("classification", "top5"),
    "NLL": ("classification", "nll"),
    "ECE": ("classification", "ece"),
    "recall@1": ("retrieval", "recall@1"),
    "MAP@R": ("retrieval", "map@r"),
}
AFTER = {
    CORRUPTED: ("corruptions", "mean_top1"),
    "mCE": ("baseline", "mce"),
    "relative mCE": ("baseline", "relative_mce"),
}
# Those that are no shares.
NUMBERS = ("NLL",)


def numbers_of(results: dict[str, Any]) -> dict[str, float]:
    """What the table says of a run, by column; without what was not measured."""
    transfers = {
        f"{dataset} {kind}": ("transfer", dataset, kind)
        for dataset in results.get("transfer", {})
        for kind in ("k-NN", "linear")
    }
    found = {}
    for title, place in (BEFORE | transfers | AFTER).items():
        value: Any = results
        for key in place:
            value = value.get(key, {})
        if title == CORRUPTED:  # of other images it is another column
            images = results.get("corruptions", {}).get("of", {}).get("images")
            title = f"{CORRUPTED} of {images} images"
        if isinstance(value, float):
            found[title] = value
    return found


def written(title: str, number: float | None) -> str:
    """A number of a column, as it is read."""
    if number is None:
        return ""
    return f"{number:.3f}" if title in NUMBERS else f"{number:.2%}"


def write_table(results: list[dict[str, Any]], folder: Path) -> None:
    """Write the table of several runs in both forms, and print it.

    Raises:
        UserError: it cannot be written there.
    """
    numbers = [numbers_of(one) for one in results]
    titles = list(dict.fromkeys(title for row in numbers for title in row))
    lines = [[*ABOUT, *titles], ["---"] * len(ABOUT) + ["---:"] * len(titles)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*ABOUT, *titles])
    for one, row in zip(results, numbers):
        about = [one[name] for name in ABOUT]
        lines.append([*about, *(written(title, row.get(title)) for title in titles)])
        table.writerow([*about, *(row.get(title) for title in titles)])
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / MARKDOWN, markdown)
        replace_text(folder / CSV, text.getvalue())
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error}") from error
    print(f"\n{markdown}written to {folder / MARKDOWN}  {folder / CSV}")
