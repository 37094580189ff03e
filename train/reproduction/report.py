"""The rows of CSV that a study ends with, and the page made of them.

The page is made of the rows alone, as they are in the files: committed rows are all that it needs.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from reproduction.claims import (
    METHODS,
    METRICS,
    NOT_COVERED,
    RAW_PIXELS,
    TABLES,
    UNTRAINED,
    Claim,
    Table,
)  # fmt: skip
from reproduction.runs import BASELINES, Job, Study
from reproduction.verdicts import CONTRADICTED, NOT_RUN, OPEN, RULE, SHOWN, judge, value
from run.atomic_write import replace_file, replace_text

PICTURE = "paper.png"
COLOURS = {SHOWN: "tab:green", OPEN: "0.5", CONTRADICTED: "tab:red"}
# A row as it is read from a file: what is not there is empty.
Row = dict[str, str]
TITLES = {RAW_PIXELS: "Raw pixels, linear classifier", UNTRAINED: "Untrained encoder"}
TITLES |= {name: method.title for name, method in METHODS.items()}
RUN_COLUMNS = (
    "scale", "method", "seed", "images", *METRICS, "learning_rate", "commit", "hardware", "torch",
    "options",
)  # fmt: skip
CLAIM_COLUMNS = (
    "scale", "table", "better", "worse", "metric", "seeds", "images", "difference", "low", "high",
    "verdict", "needed_images", "needed_seeds",
)  # fmt: skip
HEAD = """\
# The paper's claims

`python train/paper.py` tests the claims of [the paper](https://arxiv.org/abs/2004.11362) at the scale of your
machine. It trains the methods that a table of the paper compares. Then it gives a verdict on each claim. A small
scale does not reproduce the paper's numbers. It shows whether a claim also holds at that scale.

```bash
python train/paper.py --table 2 --scale digits
python train/paper.py --table 2 1 --scale fmnist10k --data_root DIR --budget 8h
```

| `--scale` | images | made for |
|---|---|---|
| `digits` | scikit-learn's digits | a CPU, minutes |
| `fmnist10k` | 10,000 of Fashion-MNIST, 16 pixels | a CPU, hours |
| `fmnist` | all of Fashion-MNIST | a GPU |
| `cifar10`, `imagenet` | those of the published recipes | a GPU |

- Runs are kept in `runs/paper/`. To resume after a stop, give the same command again.
- A run uses one process and one device. Several GPUs are not used yet.
- Tables 2 and 7 need `pip install -e ".[evaluate]"`: for max-margin, N-pairs and triplet, and for the
  corruptions.

## How the comparison is fair

- **Tuning.** Each method has the same number of trials for its learning rate, with one seed. Validation images
  choose the rate. They are held out of the training images. Test images choose nothing.
- **Compute.** Contrastive methods see two views of an image in a step, cross-entropy sees one. So cross-entropy
  is trained twice: with equal epochs, and with twice as many (equal compute).
- **Baselines.** Each table also has raw pixels and the untrained encoder, with a linear classifier.

"""


def rows_of_runs(study: Study, scale: str, tables: Sequence[str], seeds: int) -> list[Row]:
    """A row of each run that is done: what it reached, and what it was made with."""
    names = [name for table in tables for name in TABLES[table].methods]
    rows = []
    for method in dict.fromkeys([*names, *BASELINES]):
        for seed in range(seeds):
            job = Job(method, seed)
            record, options = study.record(job), study.options(job)
            if record is None or options is None or study.scores(job) is None:
                continue
            row = {name: record[name] for name in ("commit", "hardware", "torch")}
            row |= {metric: value(study, job, metric) for metric in METRICS}
            row |= {"scale": scale, "method": method, "seed": seed, "images": study.num_tested(job)}
            if method not in BASELINES:
                row["learning_rate"] = options.optimizer.learning_rate
            row["options"] = json.dumps(record["options"], sort_keys=True)
            rows.append(_written(row, RUN_COLUMNS))
    return rows


def rows_of_claims(study: Study, scale: str, tables: Sequence[str], seeds: int) -> list[Row]:
    """A row of each claim: the difference found, its interval, the verdict."""
    return [
        _written(
            {"scale": scale, "table": name, "better": claim.better, "worse": claim.worse}
            | judge(study, claim, TABLES[name].metric, seeds),
            CLAIM_COLUMNS,
        )
        for name in tables
        for claim in TABLES[name].claims
    ]


def _written(row: dict[str, Any], columns: Sequence[str]) -> Row:
    return {name: "" if row.get(name) is None else str(row[name]) for name in columns}


def write_rows(path: Path, rows: list[Row], columns: Sequence[str]) -> None:
    """Write rows as CSV in one step."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    replace_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def page(runs: list[Row], claims: list[Row]) -> str:
    """The page of all scales: verdicts first, then each table, then what has not been run."""
    parts = [HEAD]
    if any(row["verdict"] != NOT_RUN for row in claims):
        parts += [f"![The difference of each claim with its interval]({PICTURE})\n\n"]
    for scale in dict.fromkeys(row["scale"] for row in claims):
        of_scale = [row for row in claims if row["scale"] == scale]
        judged = [row for row in of_scale if row["verdict"] != NOT_RUN]
        if not judged:
            continue
        parts += [f"## Verdicts: {scale}\n\n", _verdicts(judged), "\n"]
        reached = [row for row in runs if row["scale"] == scale]
        for name in dict.fromkeys(row["table"] for row in judged):
            parts += [
                f"### {TABLES[name].title} ({scale})\n\n",
                _table(TABLES[name], reached),
                "\n",
            ]
        parts += [f"Made with {_made_with(reached)}.\n\n"]
    parts += ["## How a verdict is found\n\n", RULE, "\n", _claimed(), "\n", _missing(claims)]
    return "".join(parts)


def draw(claims: list[Row], path: Path) -> None:
    """Draw the difference of each claim that was run, if any, its interval and its verdict's colour."""
    rows = [row for row in claims if row["verdict"] != NOT_RUN]
    if not rows:
        return
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for height, row in enumerate(reversed(rows)):
        low, found, high = (100 * float(row[name]) for name in ("low", "difference", "high"))
        colour = COLOURS[row["verdict"]]
        axes.plot([low, high], [height, height], color=colour)
        axes.plot(found, height, "o", color=colour)
    names = [
        f"{TITLES[row['better']]} over {TITLES[row['worse']]}, {METRICS[row['metric']][0]}, "
        f"{row['scale']}: {row['verdict']}"
        for row in reversed(rows)
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.axvline(0, color="0.2", linewidth=1)
    axes.set_xlabel("points better, with the 95% interval")
    axes.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda file: figure.savefig(file, dpi=150))


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _difference_claimed(table: Table, claim: Claim) -> str:
    """What the paper's numbers say, in points by data set."""
    better, worse = (table.published.get(name, {}) for name in (claim.better, claim.worse))
    both = [f"{better[data] - worse[data]:+.1f} ({data})" for data in better if data in worse]
    return ", ".join(both)


def _verdicts(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        table = TABLES[row["table"]]
        claim = next(
            c for c in table.claims if (c.better, c.worse) == (row["better"], row["worse"])
        )
        low, found, high = (100 * float(row[name]) for name in ("low", "difference", "high"))
        needed = ""
        if row["needed_images"]:
            needed = f"{int(row['needed_images']):,} images, {int(row['needed_seeds']):,} seeds"
        lines.append([
            table.title.partition(":")[0],
            f"{TITLES[claim.better]} better than {TITLES[claim.worse]}"
            + ("" if claim.is_papers else " (ours)"),
            METRICS[table.metric][0],
            _difference_claimed(table, claim),
            f"{found:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"**{row['verdict']}**",
            needed,
        ])  # fmt: skip
    titles = [
        "",
        "claim",
        "by",
        "paper",
        "here, points better [95%]",
        "verdict",
        "would resolve it",
    ]
    return _markdown(titles, lines)


def _table(table: Table, runs: list[Row]) -> str:
    """The methods of a table: ours, over seeds, beside the paper's."""
    datasets = list(dict.fromkeys(d for numbers in table.published.values() for d in numbers))
    lines = []
    for method in (*table.methods, *BASELINES):
        numbers = [
            100 * float(row[table.metric])
            for row in runs
            if row["method"] == method and row[table.metric]
        ]
        ours = NOT_RUN if method in METHODS else ""
        if numbers:
            spread = f" ± {stdev(numbers):.2f}" if len(numbers) > 1 else ""
            ours = f"{mean(numbers):.2f}{spread}"
        published = table.published.get(method, {})
        theirs = [f"{published[data]:.1f}" if data in published else "" for data in datasets]
        lines.append([TITLES[method], ours, str(len(numbers)), *theirs])
    titles = ["", f"{METRICS[table.metric][0]}, %", "seeds", *(f"paper, {d}" for d in datasets)]
    return _markdown(titles, lines)


def _made_with(runs: list[Row]) -> str:
    return "; ".join(
        f"{hardware}, torch {torch}, commit {commit}"
        for hardware, torch, commit in dict.fromkeys(
            (row["hardware"], row["torch"], row["commit"]) for row in runs
        )
    )


def _claimed() -> str:
    """Every claim, and what the paper has for it."""
    lines = [
        [
            f"`--table {name}`",
            f"{TITLES[claim.better]} better than {TITLES[claim.worse]}",
            f"{METRICS[table.metric][0]}",
            "the paper's" if claim.is_papers else "ours",
            _difference_claimed(table, claim),
        ]
        for name, table in TABLES.items()
        for claim in table.claims
    ]
    titles = ["", "claim", "by", "whose", "the paper's numbers, points"]
    return "## The claims\n\n" + _markdown(titles, lines)


def _missing(claims: list[Row]) -> str:
    run = {row["table"] for row in claims if row["verdict"] != NOT_RUN}
    left = [
        f"- {table.title} (`--table {name}`)\n" for name, table in TABLES.items() if name not in run
    ]
    outside = [f"- {what}: {why}\n" for what, why in NOT_COVERED.items()]
    return "".join(["## What has not been run\n\n", *left, *outside])
