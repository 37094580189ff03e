"""The picture of a run: time and peak memory of a whole step against the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from measuring.providers import OURS
from measuring.results import Report, Result

OURS_COLOURS = ("#c1272d", "#e8820c", "#8e2de2")
OTHER_COLOURS = ("#1f4e79", "#2a9d8f", "#6c757d", "#b08900", "#5e548e")
LABEL_GAP = 0.055
"""Least distance between two labels, as a share of the panel's height."""

Band = tuple[float, float, float]  # low, middle, high


def draw_picture(report: Report, path: Path) -> None:
    """Write two log-log panels; each line carries its provider's name at its end."""
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    _draw_panel(time_axes, report, _time_band)
    _draw_panel(memory_axes, report, _memory_band)
    time_axes.set_title("Time of forward and backward in ms: median, quartiles", loc="left")
    memory_axes.set_title("Peak memory above the inputs in MiB", loc="left")
    first, machine = report.results[0], report.machine
    place = machine["gpu"] or f"{machine['num_threads']} threads of {machine['cpu']}"
    title = f"Supervised contrastive loss, D={first.dim}, {first.dtype}, {place}"
    figure.suptitle(
        f"{title}, torch {machine['torch']}, supcon_kernels {machine['supcon_kernels']}",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _time_band(result: Result) -> Band | None:
    low, middle, high = result.time_q25_ms, result.time_ms, result.time_q75_ms
    return (low, middle, high) if low and middle and high else None


def _memory_band(result: Result) -> Band | None:
    peak = result.peak_mib
    return (peak, peak, peak) if peak else None


def _draw_panel(axes: Axes, report: Report, band_of: Callable[[Result], Band | None]) -> None:
    axes.set(xscale="log", yscale="log", xlabel="rows N")
    colours = _colours(report.providers)
    ends: dict[str, tuple[float, float]] = {}
    for provider, colour in colours.items():
        found = [report.find(num_rows, provider, "both") for num_rows in report.sizes]
        bands = {r.num_rows: band for r in found if r and (band := band_of(r))}
        if not bands:
            continue
        sizes = list(bands)
        low, middle, high = zip(*bands.values(), strict=True)
        width = 2.6 if provider.startswith(OURS) else 1.5
        axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
        axes.plot(sizes, middle, color=colour, lw=width, marker="o", ms=2.5 * width)
        ends[provider] = (sizes[-1], middle[-1])
    axes.xaxis.set_major_locator(FixedLocator(report.sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, ends, colours)


def _colours(providers: list[str]) -> dict[str, str]:
    """Warm colours for ours, cool ones for the others; ours last, so that they lie on top."""
    ours = [name for name in providers if name.startswith(OURS)]
    others = [name for name in providers if not name.startswith(OURS)]
    return {
        name: palette[i % len(palette)]
        for names, palette in ((others, OTHER_COLOURS), (ours, OURS_COLOURS))
        for i, name in enumerate(names)
    }


def _label_ends(axes: Axes, ends: dict[str, tuple[float, float]], colours: dict[str, str]) -> None:
    """Name each line at its end, pushing labels upwards until none covers another."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    lowest = -1.0
    for provider, end in sorted(ends.items(), key=lambda item: item[1][1]):
        x, y = to_axes.transform(end)
        lowest = max(y, lowest + LABEL_GAP)
        axes.annotate(
            provider,
            xy=(x, y),
            xytext=(1.03, lowest),
            xycoords="axes fraction",
            color=colours[provider],
            va="center",
            fontsize=9,
            fontweight="bold" if provider.startswith(OURS) else "normal",
            arrowprops={"arrowstyle": "-", "color": colours[provider], "lw": 0.5, "alpha": 0.5},
        )
