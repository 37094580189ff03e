"""The pictures of a study, of its rows alone: every claim with its interval, and the paper's Figures 3 and 4."""

from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproduction.claims import METRICS, SEVERITIES, TABLES
from reproduction.methods import (
    BASELINES,
    METHODS,
    REFERENCE,
    SETTINGS,
    SUPCON,
    TEMPERATURES,
)
from reproduction.verdicts import CONTRADICTED, NOT_RUN, OPEN, SHOWN

OVERVIEW = "paper.png"
# By table: the file, of each scale.
FIGURES = {"figure 3": "paper_figure3_{}.png", "figure 4": "paper_figure4_{}.png"}
COLOURS = {SHOWN: "tab:green", OPEN: "0.5", CONTRADICTED: "tab:red"}
# A row as it is read from a file: what is not there is empty.
Row = dict[str, str]
TITLES = {name: method.title for name, method in (METHODS | BASELINES).items()}


def of_method(runs: list[Row], method: str, metric: str) -> list[float]:
    """A metric of the runs of a method, in percent."""
    return [100 * float(row[metric]) for row in runs if row["method"] == method and row.get(metric)]


def pictures(runs: list[Row], claims: list[Row]) -> dict[str, Figure]:
    """By file name: of all claims that were run, and of each figure of a scale whose claim was."""
    judged = [row for row in claims if row["verdict"] != NOT_RUN]
    drawn = {OVERVIEW: _overview(judged)} if judged else {}
    for row in judged:
        if row["table"] in FIGURES:
            of_scale = [run for run in runs if run["scale"] == row["scale"]]
            draw = _by_severity if row["table"] == "figure 3" else _by_setting
            drawn[FIGURES[row["table"]].format(row["scale"])] = draw(of_scale)
    return drawn


def _overview(rows: list[Row]) -> Figure:
    """The difference of each claim, its interval and its verdict's colour.

    Claims about accuracy come first. Those about errors have a scale of their own.
    """
    by_axes: dict[bool, list[Row]] = {}
    for row in sorted(rows, key=_is_about_errors):
        by_axes.setdefault(_is_about_errors(row), []).append(row)
    parts = list(by_axes.values())
    figure = Figure(figsize=(9, 1.2 * len(parts) + 0.3 * len(rows)), layout="constrained")
    heights = [3 + len(part) for part in parts]
    for axes, part in zip(
        figure.subplots(len(parts), squeeze=False, height_ratios=heights)[:, 0], parts
    ):
        _draw_claims(axes, part)
    return figure


def _is_about_errors(row: Row) -> bool:
    return not METRICS[row["metric"]][1]


def _draw_claims(axes: Axes, rows: list[Row]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
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


def _by_severity(runs: list[Row]) -> Figure:
    """Figure 3: accuracy under corruptions, the mean over them and over seeds."""
    lines = {
        method: [of_method(runs, method, metric) for metric in SEVERITIES]
        for method in TABLES["figure 3"].methods
    }
    figure, axes = _axes(height=4)
    for method, line in lines.items():
        if all(line):
            axes.plot(
                range(1, len(line) + 1), [mean(found) for found in line], "o-", label=TITLES[method]
            )
    axes.set_xticks(range(1, len(SEVERITIES) + 1))
    axes.set_xlabel("severity of the corruption")
    axes.set_ylabel("top-1, %")
    axes.legend(frameon=False)
    return figure


def _by_setting(runs: list[Row]) -> Figure:
    """Figure 4: the accuracy of each setting, SupCon's beside that of cross-entropy."""
    settings = SETTINGS | TEMPERATURES
    figure, axes = _axes(height=1.2 + 0.3 * len(settings))
    for loss, colour, above in ((SUPCON, "tab:blue", 0.12), (REFERENCE, "tab:orange", -0.12)):
        points = [
            (number, height + above)
            for height, setting in enumerate(reversed(settings))
            for number in of_method(runs, f"{loss}_{setting}", "top1")
        ]
        numbers, heights = ([point[k] for point in points] for k in (0, 1))
        axes.plot(numbers, heights, "o", color=colour, alpha=0.6, label=TITLES[loss])
    axes.set_yticks(range(len(settings)), [title for title, *_ in reversed(settings.values())])
    axes.set_xlabel("top-1, %, of each seed")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _axes(*, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
