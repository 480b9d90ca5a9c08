"""Figures as PNG and SVG: scores against the number of function evaluations, and paths of one-dimensional samples.

    save("compare", scores_against_nfe([Series("teacher", "ddim", [1, 4, 64], [40.0, 4.0, 0.8])], metric="fid"))

Drawn without a display, and the same bytes for the same numbers under one version of Matplotlib.
"""

import io
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mscm import atomic

# Okabe and Ito's colours, which people tell apart however they see colours; black first.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LEGEND_INSIDE = 5  # lines, of which the legend leaves room for the points
_GREY = "#8C8C8C"

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#404040",
    "legend.frameon": False,
    "savefig.dpi": 120,
    "svg.hashsalt": "mscm",  # names within the file are random otherwise
}


class Series(NamedTuple):
    """Scores of one method under one sampler; each method has a colour, each of its samplers a marker."""

    method: str
    sampler: str
    nfe: Sequence[int]
    mean: Sequence[float]
    spread: Sequence[float | None]  # standard deviation; None: of one value


class Panel(NamedTuple):
    """Paths of one model, as states at equally spaced times from t = 1 to t = 0."""

    title: str
    states: Float[np.ndarray, "steps n"]


def scores_against_nfe(
    series: Sequence[Series], *, metric: str, level: tuple[str, float] | None = None
) -> Figure:
    """One line for each series with error bars; `level` is the name and value of a horizontal reference."""
    with matplotlib.rc_context(_STYLE):
        is_long = len(series) > _LEGEND_INSIDE
        figure = Figure(figsize=(8.6 if is_long else 6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        methods = list(dict.fromkeys(line.method for line in series))
        drawn: dict[str, int] = {}
        for line in series:
            again, colour = divmod(methods.index(line.method), len(COLOURS))
            index = drawn.setdefault(line.method, again)
            drawn[line.method] += 1
            axes.errorbar(
                line.nfe,
                line.mean,
                yerr=[spread or 0.0 for spread in line.spread] if any(line.spread) else None,
                label=f"{line.method}, {line.sampler}",
                color=COLOURS[colour],
                marker=MARKERS[index % len(MARKERS)],
                linestyle=("-", "--", ":", "-.")[index % 4],
                markersize=5,
                linewidth=1.4,
                capsize=2.5,
            )
        if level is not None:
            axes.axhline(level[1], color=_GREY, linewidth=1.0, linestyle=(0, (5, 3)), label=level[0], zorder=0)
        _nfe_axis(axes, [nfe for line in series for nfe in line.nfe])
        _score_axis(axes, [value for line in series for value in line.mean] + ([level[1]] if level else []))
        axes.set_ylabel(metric)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: level is not None and labels[i] == level[0])  # the level last
        handles, labels = [handles[i] for i in order], [labels[i] for i in order]
        if is_long:
            figure.legend(handles, labels, loc="outside right center")
        else:
            # Opaque: the level would strike it through.
            axes.legend(handles, labels, frameon=True, facecolor="white", edgecolor="none", framealpha=1.0)
        return figure


def _nfe_axis(axes: Axes, values: Sequence[int]) -> None:
    low, high = int(np.floor(np.log2(min(values)))), int(np.ceil(np.log2(max(values))))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0 ** (low - 0.3), 2.0 ** (max(high, low + 1) + 0.3))
    axes.xaxis.set_major_locator(ticker.FixedLocator([2.0**k for k in range(low, max(high, low + 1) + 1)]))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("function evaluations (NFE)")


def _score_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the scores span more than a factor of ten."""
    if min(values) <= 0 or max(values) < 10 * min(values):
        return
    axes.set_yscale("log")
    plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    # Decades alone leave a reader of two of them without numbers.
    few = max(values) < 300 * min(values)
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2.0, 5.0) if few else "auto"))
    axes.yaxis.set_minor_formatter(plain if few else ticker.NullFormatter())


def trajectories(
    panels: Sequence[Panel],
    exact: Float[np.ndarray, "times n"],
    *,
    x: Float[np.ndarray, "m"],
    density_data: Float[np.ndarray, "m"],
    density_noise: Float[np.ndarray, "m"],
) -> Figure:
    """Paths of one-dimensional samples, data above and noise below: each model's over the exact ones.

    The first figure of arXiv:2403.06807v3. `exact` are the probability-flow paths from the same noise, as a panel's
    states; the densities at `x` are those of the two ends, in units in which their height in the figure is arbitrary.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(0.5 + 2.1 * len(panels), 4.6), layout="constrained")
        every = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        height = 0.16
        for index, (axes, panel) in enumerate(zip(every, panels, strict=True)):
            axes.plot(exact, np.linspace(1.0, 0.0, len(exact)), color="#A8A8A8", linewidth=0.8, zorder=1)
            num_steps = len(panel.states) - 1
            colour = COLOURS[1 + index % (len(COLOURS) - 1)]
            few = num_steps <= 16
            axes.plot(
                panel.states, np.linspace(1.0, 0.0, num_steps + 1), color=colour, linewidth=1.0, alpha=0.85, zorder=2,
                marker="o" if few else None, markersize=2.4,
            )
            if few:
                axes.hlines(np.arange(num_steps + 1) / num_steps, x[0], x[-1], color="#DDDDDD", linewidth=0.7, zorder=0)
            for density, sign, end in ((density_data, -1.0, 0.0), (density_noise, 1.0, 1.0)):
                edge = end + sign * height * density / density.max()
                axes.fill_between(x, end, edge, color="#D9D9D9", linewidth=0, zorder=0)
                axes.plot(x, edge, color="#606060", linewidth=0.8)
            axes.set_title(panel.title)
            axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "1/4", "1/2", "3/4", "1"])
            axes.tick_params(length=2.5)
        every[0].set_xlim(x[0], x[-1])
        every[0].set_ylim(1.0 + 1.15 * height, -1.15 * height)  # downwards: data at the top
        every[0].set_ylabel("time t: data 0, noise 1")
        figure.supxlabel("x (grey: exact probability-flow paths)", fontsize=_STYLE["font.size"])
        return figure


def save(stem: str | os.PathLike, figure: Figure) -> list[str]:
    """Writes STEM.png and STEM.svg and returns their paths."""
    png, svg = f"{os.fspath(stem)}.png", f"{os.fspath(stem)}.svg"
    with matplotlib.rc_context(_STYLE):
        pixels = io.BytesIO()
        figure.savefig(pixels, format="png")
        with atomic.writing(png) as file:  # a third of the size with a palette
            Image.open(pixels).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        with atomic.writing(svg) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})  # equal figures are equal files
    return [png, svg]
