"""Test the claims of the SupCon paper at the scale of this machine: shown, not resolved, contradicted.

python train/paper.py --table 2 --scale digits
python train/paper.py --table 2 1 5 --figure 3 4 --scale fmnist10k --data_root DIR --budget 8h

Runs are kept in runs/paper. Each has a folder named by its options. To resume after a stop, give the same
command again. At the end a report is written; `--budget 0min` writes it without any run.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from reproduction.claims import FIGURES, TABLES, option_of
from reproduction.methods import METHODS
from reproduction.pictures import Row, pictures
from reproduction.processes import share_threads
from reproduction.report import (
    CLAIM_COLUMNS,
    RUN_COLUMNS,
    page,
    read_rows,
    rows_of_claims,
    rows_of_runs,
    summary,
    with_earlier_claims,
    with_earlier_runs,
    write_rows,
)
from reproduction.runs import Study, jobs_of
from reproduction.scales import SCALES
from reproduction.schedule import make
from run.atomic_write import replace_file, replace_text
from run.command_line import parse, run_script
from run.device import Device
from run.rules import broken, out_of_range

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]
REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS, PAGE = REPOSITORY / "benchmarks" / "results", REPOSITORY / "docs" / "paper.md"
README, MARKS = REPOSITORY / "README.md", ("<!-- paper:begin -->\n", "<!-- paper:end -->")
# The figures have an option of their own.
NAMED = [name for name in TABLES if option_of(name) == f"--table {name}"]
SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass
class PaperOptions:
    """The claims of the paper.

    Args:
        table: 2 1 5 6 7 8 9 are the paper's tables; memory, noise, tail and few go beyond it. Default:
            all tables and figures, unless --figure is given.
        figure: 3 4 are the paper's figures: corruptions by severity, and how much hyperparameters matter.
        methods: Only these methods of the tables. Default: all.
        scale: digits: minutes on a CPU. fmnist10k: 10,000 images of Fashion-MNIST at 16 pixels, hours on
            a CPU. fmnist: all of it, for a GPU. cifar10, imagenet: the published recipes.
        seeds: Runs of each method. A verdict needs 3.
        trials: Learning rates to try for each method. The recipe's is in the middle; each is three
            times the one before. 1: only that of the recipe.
        epochs: Another number than that of the scale, for a quick look.
        budget: Do not start a run that would end later, such as 90s, 150min or 8h. Default: no limit.
        jobs: Runs at the same time, which share the device and the CPU threads: for a GPU that a small
            run does not fill. On a CPU give the same number again to resume.
        data_root: As in pretrain.py.
        output_dir: Folder for the runs and the report.
        workers: As in pretrain.py.
        device: As in pretrain.py.
        update_docs: Copy the results of this scale to benchmarks/results, beside those there of other
            runs, and write docs/paper.md and README's table from all of them.
    """

    table: list[str] = field(default_factory=list)
    figure: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    scale: Literal["digits", "fmnist10k", "fmnist", "cifar10", "imagenet"] = "digits"
    seeds: int = 3
    trials: int = 3
    epochs: int | None = None
    budget: str | None = None
    jobs: int = 1
    data_root: str | None = None
    output_dir: str = "runs/paper"
    workers: int = 0
    device: Device = "auto"
    update_docs: bool = False

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        rules = [
            (
                set(self.table) <= set(NAMED),
                f"--table {' '.join(self.table)}: accepted are {', '.join(NAMED)}",
            ),
            (
                set(self.figure) <= set(FIGURES),
                f"--figure {' '.join(self.figure)}: accepted are {', '.join(FIGURES)}",
            ),
            (
                set(self.methods) <= METHODS.keys(),
                f"--methods {' '.join(self.methods)}: accepted are {', '.join(METHODS)}",
            ),
            (
                self.budget is None or _BUDGET.fullmatch(self.budget) is not None,
                f"--budget {self.budget}: a number of s, min or h is needed, such as 150min",
            ),
        ]
        at_least = {"seeds": 1, "trials": 1, "epochs": 2, "jobs": 1, "workers": 0}
        return broken(rules) + out_of_range(self, at_least=at_least)

    @property
    def asked(self) -> list[str]:
        """The tables and figures to make, by their names in TABLES."""
        return [*self.table, *(f"figure {number}" for number in self.figure)] or list(TABLES)

    @property
    def seconds(self) -> float:
        """Those of the budget."""
        if self.budget is None:
            return float("inf")
        found = _BUDGET.fullmatch(self.budget)
        assert found is not None
        return float(found[1]) * SECONDS[found[2]]


_BUDGET = re.compile(r"(\d+\.?\d*)(s|min|h)")


def main(argv: list[str] | None = None) -> Path:
    """Run what the command line asks for; returns the report."""
    options = parse(PaperOptions, argv, prog="train/paper.py", description=DESCRIPTION)
    if options.jobs > 1:
        share_threads(options.jobs)
    # Nobody looks at a run while it is made, nor at each of so many.
    local: dict[str, Any] = {"log": "csv", "pictures": False, "knn_every": 0}
    local |= {"workers": options.workers, "device": options.device}
    if options.data_root is not None:
        local["data_root"] = options.data_root
    root = Path(options.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    study = Study(SCALES[options.scale], root, options.trials, options.epochs, local)
    jobs = jobs_of(
        options.asked,
        options.methods or METHODS,
        study.scale,
        seeds=options.seeds,
        trials=options.trials,
    )
    make(study, jobs, options.seconds, at_once=options.jobs)
    return report(study, options)


def report(study: Study, options: PaperOptions) -> Path:
    """Write the rows and the page of what is done, of every table; returns the page."""
    about = (study, options.scale, list(TABLES), options.seeds)
    runs, claims = rows_of_runs(*about), rows_of_claims(*about)
    path = study.root / f"{options.scale}.md"
    replace_text(path, page(runs, claims))
    draw(runs, claims, study.root)
    names = [f"paper_{options.scale}_{what}.csv" for what in ("runs", "claims")]
    write_rows(study.root / names[0], runs, RUN_COLUMNS)
    write_rows(study.root / names[1], claims, CLAIM_COLUMNS)
    if options.update_docs:
        before = [read_rows(RESULTS / name) for name in names]
        write_rows(RESULTS / names[0], with_earlier_runs(runs, before[0]), RUN_COLUMNS)
        write_rows(RESULTS / names[1], with_earlier_claims(claims, before[1]), CLAIM_COLUMNS)
        replace_text(PAGE, page(*committed_rows()))
        replace_text(README, between_marks(README.read_text(), summary(*committed_rows())))
        draw(*committed_rows(), PAGE.parent)
        print(f"written to {PAGE}")
    for row in claims:
        if row["table"] in options.asked:
            claim = f"{row['better']} better than {row['worse']} by {row['metric']}"
            print(f"{option_of(row['table'])}: {claim}: {row['verdict']}")
    print(f"written to {path}")
    return path


def draw(runs: list[Row], claims: list[Row], folder: Path) -> None:
    """Write the pictures of what is done to a folder."""
    for name, figure in pictures(runs, claims).items():
        replace_file(folder / name, partial(figure.savefig, dpi=150))


def between_marks(text: str, content: str) -> str:
    """A document with other content between the marks."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}{content}{MARKS[1]}{after}"


def committed_rows() -> tuple[list[Row], list[Row]]:
    """Those of the runs and of the claims, of all scales that have committed results."""
    runs, claims = (
        [row for scale in SCALES for row in read_rows(RESULTS / f"paper_{scale}_{what}.csv")]
        for what in ("runs", "claims")
    )
    return runs, claims


if __name__ == "__main__":
    run_script(main, if_interrupted="(the same command goes on)")
