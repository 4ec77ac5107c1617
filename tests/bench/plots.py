"""The report's pictures: white ground, so that they read in dark mode too; colours of Okabe and Ito.

"Color Universal Design", Okabe and Ito, 2008: told apart with every kind of colour blindness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")  # before pyplot: no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#8A8A8A"
STAGES = {
    "preprocessing": SKY,
    "super-resolution": BLUE,
    "scoring": ORANGE,
    "filtering and splitting": YELLOW,
    "describing": PINK,
    "interpolating": GREEN,
    "rest": GREY,
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
    "savefig.dpi": 160,
}


def draw(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw what there are results for; the names of the files, which begin with the measurement's."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, plot in PLOTS.items():
        result = results.get(name, {"error": "not measured"})
        if "error" in result:
            continue
        made.append(f"{name}.png")
        with mpl.rc_context(STYLE):
            plot(result, folder / made[-1])
    return made


@contextmanager
def axes(path: Path, width: float, height: float) -> Iterator[Axes]:
    """Axes of a figure in inches, saved to the path afterwards."""
    figure, canvas = plt.subplots(figsize=(width, height))
    try:
        yield canvas
        figure.savefig(path, metadata={"Software": None})
    finally:
        plt.close(figure)


def transport(result: dict[str, Any], path: Path) -> None:
    """Median ms of each way, on a log scale."""
    times = {way: median for way, (median, _) in result["ms"].items()}
    names = sorted(times, key=lambda way: -times[way])
    with axes(path, 8.5, 0.42 * len(names) + 1.2) as ax:
        bars = ax.barh(names, [times[way] for way in names], color=[_way(way) for way in names])
        ax.bar_label(bars, [f"{times[way]:,.0f} ms" for way in names], padding=5)
        ax.set_xscale("log")
        ax.set_xlim(min(times.values()) / 3, max(times.values()) * 3)
        ax.grid(axis="x", which="major")
        ax.tick_params(axis="y", length=0)
        ax.set_title("Two 4096×2048 panoramas, there and back")
        ax.set_xlabel("median ms, logarithmic")


def _way(name: str) -> str:
    if name == "memcpy":
        return GREY
    return BLUE if "memory" in name or name in ("gRPC", "HTTP") else ORANGE


def pipeline(result: dict[str, Any], path: Path) -> None:
    """Seconds of a group by stage, one bar per way."""
    ways = list(result["stages"])
    with axes(path, 9, 2.8) as ax:
        left = [0.0] * len(ways)
        for stage, colour in STAGES.items():
            seconds = [result["stages"][way].get(stage, 0.0) for way in ways]
            ax.barh(ways, seconds, left=left, color=colour, label=stage, height=0.55)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        for way, total in zip(ways, left, strict=True):
            ax.annotate(f" {total:.1f} s", (total, way), va="center", fontweight="bold")
        ax.set_xlim(right=max(left) * 1.12)
        ax.invert_yaxis()
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.set_title(f"One group: {result['ratio']:.1f} times as fast without file hops")
        ax.set_xlabel("seconds")
        ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.28), fontsize=9)


def breakdown(result: dict[str, Any], path: Path) -> None:
    """When each model computed, one row per model."""
    rows = sorted(result["timeline"].items(), key=lambda item: -min(s for s, _ in item[1]))
    with axes(path, 9, 0.34 * len(rows) + 1.4) as ax:
        for y, (name, spans) in enumerate(rows):
            network = name in result["wall"]
            bars = [(start, end - start) for start, end in spans]
            ax.broken_barh(bars, (y - 0.36, 0.72), color=ORANGE if network else BLUE)
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.tick_params(axis="y", length=0)
        ax.set_xlim(0, result["seconds"])
        ax.grid(axis="x")
        ax.set_title("Who computes when, in one group")
        ax.set_xlabel("seconds; orange: networks, blue: the models that call them, geometry")


def scaling(result: dict[str, Any], path: Path) -> None:
    """Throughput and the cores' use against groups at once."""
    steps = result["steps"]
    groups = [each["groups"] for each in steps]
    with axes(path, 8, 4.2) as ax:
        rates = [each["groups_a_minute"] for each in steps]
        ax.plot(groups, rates, "o-", color=BLUE, linewidth=2.2, label="groups a minute")
        ax.set_xscale("log", base=2)
        ax.set_xticks(groups, list(map(str, groups)))
        ax.set_ylim(0, max(rates) * 1.25)
        ax.grid(axis="y")
        ax.set_title("Groups at once")
        ax.set_xlabel("groups at once")
        ax.set_ylabel("groups a minute", color=BLUE)
        other = ax.twinx()
        shares = [each["own_share"] * 100 for each in steps]
        other.plot(groups, shares, "s--", color=RED, linewidth=1.6)
        other.set_ylim(0, 110)
        other.set_ylabel("cores busy with them, %", color=RED)
        other.spines["right"].set_visible(True)


def cost(result: dict[str, Any], path: Path) -> None:
    """Measured time of the small preset beside this machine's floor, per network."""
    parts = result["small"]
    places = range(len(parts))
    with axes(path, 8.5, 0.8 * len(parts) + 1.2) as ax:
        for offset, key, colour, label in (
            (-0.2, "measured_s", ORANGE, "measured"),
            (0.2, "floor_s", BLUE, "floor: FLOPs at the matmul peak or bytes at the copy's"),
        ):
            values = [each[key] for each in parts.values()]
            bars = ax.barh([y + offset for y in places], values, 0.38, color=colour, label=label)
            ax.bar_label(bars, [f"{value:.3g} s" for value in values], padding=4, fontsize=9)
        ax.set_xscale("log")
        shown = [each[key] for each in parts.values() for key in ("measured_s", "floor_s")]
        ax.set_xlim(min(shown) / 3, max(shown) * 4)
        ax.set_yticks(places, list(parts))
        ax.invert_yaxis()
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.set_title("Small preset, an image or a tile: measured against the floor")
        ax.set_xlabel("seconds, logarithmic")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, fontsize=9)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "transport": transport,
    "pipeline": pipeline,
    "breakdown": breakdown,
    "scaling": scaling,
    "cost": cost,
}
