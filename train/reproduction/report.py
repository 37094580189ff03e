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

from reproduction.claims import METRICS, NOT_COVERED, TABLES, Claim, Table, option_of
from reproduction.methods import BASELINES, METHODS
from reproduction.pictures import FIGURES, OVERVIEW, TITLES, Row, of_method
from reproduction.runs import Job, Study
from reproduction.scales import SCALES
from reproduction.verdicts import NOT_RUN, RULE, judge, value
from run.atomic_write import replace_text

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
python train/paper.py --table 2 1 5 --figure 3 4 --scale fmnist10k --data_root DIR --budget 8h
```

| `--scale` | images | made for |
|---|---|---|
| `digits` | scikit-learn's digits | a CPU, minutes |
| `fmnist10k` | 10,000 of Fashion-MNIST, 16 pixels | a CPU, hours |
| `fmnist` | all of Fashion-MNIST | a GPU |
| `cifar10`, `imagenet` | those of the published recipes | a GPU |

- Without `--table` and `--figure` everything is run, what settles most first.
- Runs are kept in `runs/paper/`. To resume after a stop, give the same command again.
- A run uses one process and one device. Several GPUs are not used yet.
- `--jobs 12` makes twelve runs at the same time, for a GPU that a small run does not fill.
- Tables 2 and 7 and Figure 3 need `pip install -e ".[evaluate]"`: for max-margin, N-pairs and triplet, and for the
  corruptions.

## How the comparison is fair

- **Tuning.** Each method has the same number of trials for its learning rate, with one seed. In Tables 8 and 9
  so does each linear stage, on the encoder of the best trial. Validation images choose the rate. They are held
  out of the training images. Test images choose nothing.
- **Compute.** Contrastive methods see two views of an image in a step, cross-entropy sees one. So cross-entropy
  is trained twice: with equal epochs, and with twice as many (equal compute).
- **Baselines.** Each table also has raw pixels and the untrained encoder, with a linear classifier
  that is trained on the same images.

"""


def rows_of_runs(study: Study, scale: str, tables: Sequence[str], seeds: int) -> list[Row]:
    """A row of each run that is done: what it reached, and what it was made with."""
    chosen = [TABLES[table] for table in tables]
    names = [name for table in chosen for name in table.methods]
    names += [name for table in chosen for name in table.baselines]
    rows = []
    for method in dict.fromkeys(names):
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
            | judge(study, claim, seeds),
            CLAIM_COLUMNS,
        )
        for name in tables
        for claim in TABLES[name].claims
    ]


def _written(row: dict[str, Any], columns: Sequence[str]) -> Row:
    return {name: "" if row.get(name) is None else str(row[name]) for name in columns}


def with_earlier_runs(runs: list[Row], earlier: list[Row]) -> list[Row]:
    """The runs of this folder, and those of another of which it has none."""
    found = {(row["method"], row["seed"]): row for row in [*earlier, *runs]}
    order = {name: place for place, name in enumerate((*METHODS, *BASELINES))}
    known = [key for key in found if key[0] in order]
    return [found[key] for key in sorted(known, key=lambda key: (order[key[0]], int(key[1])))]


def with_earlier_claims(claims: list[Row], earlier: list[Row]) -> list[Row]:
    """The claims of this folder; those of another where that had more seeds."""

    def key(row: Row) -> tuple[str, ...]:
        return row["table"], row["better"], row["worse"], row["metric"]

    found = {key(row): row for row in earlier}
    pairs = [(row, found.get(key(row), row)) for row in claims]
    return [before if int(before["seeds"]) > int(row["seeds"]) else row for row, before in pairs]


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
        parts += [f"![The difference of each claim with its interval]({OVERVIEW})\n\n"]
    for scale in dict.fromkeys(row["scale"] for row in claims):
        of_scale = [row for row in claims if row["scale"] == scale]
        judged = [row for row in of_scale if row["verdict"] != NOT_RUN]
        if not judged:
            continue
        parts += [f"## Verdicts: {scale}\n\n", _verdicts(judged), "\n"]
        reached = [row for row in runs if row["scale"] == scale]
        for name in dict.fromkeys(row["table"] for row in judged):
            title = f"{TABLES[name].title} ({scale})"
            parts += [f"### {title}\n\n", _table(TABLES[name], scale, reached), "\n"]
            if name in FIGURES:
                parts += [f"![{title}]({FIGURES[name].format(scale)})\n\n"]
        parts += [f"Made with {_made_with(reached)}.\n\n"]
    parts += ["## How a verdict is found\n\n", RULE, "\n", _claimed(), "\n", _missing(claims)]
    return "".join(parts)


def summary(runs: list[Row], claims: list[Row]) -> str:
    """README's table and picture: Table 2 at the last scale that has a verdict on it; empty: none has."""
    judged = [row for row in claims if row["table"] == "2" and row["verdict"] != NOT_RUN]
    if not judged:
        return ""
    scale = judged[-1]["scale"]
    reached = [row for row in runs if row["scale"] == scale]
    about = "Top-1 on test images, mean and standard deviation over seeds, beside the paper's"
    picture = f"![The difference of each claim with its interval](docs/{OVERVIEW})"
    table = _table(TABLES["2"], scale, reached, only_run=True)
    return f"{about} (`--scale {scale}`):\n\n{table}\n{picture}\n"


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _difference_claimed(table: Table, claim: Claim) -> str:
    """What the paper's numbers say, in points by data set."""
    if claim.metric != "top1":
        return ""
    better, worse = (table.published.get(name, {}) for name in (claim.better, claim.worse))
    both = [f"{better[data] - worse[data]:+.1f} ({data})" for data in better if data in worse]
    return ", ".join(both)


def _said(claim: Claim) -> str:
    return f"{TITLES[claim.better]} better than {TITLES[claim.worse]}"


def _verdicts(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        table = TABLES[row["table"]]
        asked = (row["better"], row["worse"], row["metric"])
        claim = next(c for c in table.claims if (c.better, c.worse, c.metric) == asked)
        low, found, high = (100 * float(row[name]) for name in ("low", "difference", "high"))
        needed = ""
        if row["needed_images"]:
            needed = f"{int(row['needed_images']):,} images, {int(row['needed_seeds']):,} seeds"
        lines.append([
            table.title.partition(":")[0],
            _said(claim) + ("" if claim.is_papers else " (ours)"),
            METRICS[claim.metric][0],
            _difference_claimed(table, claim),
            f"{found:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"**{row['verdict']}**",
            needed,
        ])  # fmt: skip
    titles = ["", "claim", "by", "paper"]
    return _markdown([*titles, "here, points better [95%]", "verdict", "would resolve it"], lines)


def _table(table: Table, scale: str, runs: list[Row], *, only_run: bool = False) -> str:
    """The methods of a table, or those that were run: ours, over seeds, beside the paper's."""
    datasets = list(dict.fromkeys(d for numbers in table.published.values() for d in numbers))
    lines = []
    for method in (*table.methods, *table.baselines):
        if not SCALES[scale].has(method):
            continue
        numbers = [of_method(runs, method, metric) for metric in table.columns]
        if only_run and not any(numbers):
            continue
        nothing = NOT_RUN if method in METHODS else ""
        published = table.published.get(method, {})
        theirs = [f"{published[data]:.1f}" if data in published else "" for data in datasets]
        ours = [_mean(found) or nothing for found in numbers]
        lines.append([TITLES[method], *ours, str(max(map(len, numbers))), *theirs])
    titles = [f"{METRICS[metric][0]}, %" for metric in table.columns]
    return _markdown(["", *titles, "seeds", *(f"paper, {d}" for d in datasets)], lines)


def _mean(numbers: list[float]) -> str:
    """Over seeds, with the standard deviation."""
    spread = f" ± {stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.2f}{spread}" if numbers else ""


def _made_with(runs: list[Row]) -> str:
    """The machines, each with its commits."""
    commits: dict[tuple[str, str], list[str]] = {}
    for hardware, torch, commit in dict.fromkeys(
        (row["hardware"], row["torch"], row["commit"]) for row in runs
    ):
        commits.setdefault((hardware, torch), []).append(commit)
    return "; ".join(
        f"{hardware}, torch {torch}, {'commit' if len(found) == 1 else 'commits'} {', '.join(found)}"
        for (hardware, torch), found in commits.items()
    )


def _claimed() -> str:
    """Every claim, and what the paper has for it."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for name, table in TABLES.items():
        for claim in table.claims:
            numbers = _difference_claimed(table, claim)
            whose = "" if claim.is_papers else " (ours)"
            lines.setdefault((name, claim.better, claim.metric), []).append(
                TITLES[claim.worse] + whose + (f": {numbers}" if numbers else "")
            )
    titles = ["", "what is better", "than what (points by the paper)", "by"]
    return "## The claims\n\n" + _markdown(
        titles,
        [
            [f"`{option_of(name)}`", TITLES[better], "<br>".join(others), METRICS[metric][0]]
            for (name, better, metric), others in lines.items()
        ],
    )


def _missing(claims: list[Row]) -> str:
    run = {row["table"] for row in claims if row["verdict"] != NOT_RUN}
    left = [
        f"- {table.title} (`{option_of(name)}`)\n"
        for name, table in TABLES.items()
        if name not in run
    ]
    outside = [f"- {what}: {why}\n" for what, why in NOT_COVERED.items()]
    return "".join(["## What has not been run\n\n", *left, *outside])
