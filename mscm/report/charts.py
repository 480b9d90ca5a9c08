"""Line charts as SVG within a page: small, and without a colour of their own, which `page.STYLE` gives.

    charts.chart("Loss", [charts.Line("loss", [200, 400], [0.31, 0.28])], x_label="step")
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

from mscm.report.page import escape, number

COLOURS = 8  # of the style; after them they begin again, dashed
_MAX_LINES, _MAX_POINTS = 24, 300
_LARGEST, _SMALLEST = 1e30, 1e-30  # beyond them arithmetic on the axes would overflow
# Units of the picture: it is about as wide as a phone, on which they are pixels.
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 8, 38


class Line(NamedTuple):
    """One curve, of those points whose numbers are finite."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float | None] = ()  # standard deviations; empty: none


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    log2_x: bool = False,
    marks: bool = False,
    log_y: bool = True,
    level: tuple[str, float] | None = None,
    note: str = "",
) -> str:
    """A figure of the lines, with a legend where there are several and the numbers of their ends for who cannot see it.

    With `log_y` the values are on a logarithmic axis where they span more than a factor of ten. `marks` shows the
    points; without them a line of more than 300 is drawn through the means of as many groups. `level` is the name and
    value of a horizontal line. Nothing where there is no finite point.
    """
    if level is not None and not abs(level[1]) < _LARGEST:
        level = None
    more = f"{len(lines) - _MAX_LINES} more are left out. " if len(lines) > _MAX_LINES else ""
    drawn = [_finite(line) for line in lines[:_MAX_LINES]]
    if not marks:
        drawn = [_thinned(line) for line in drawn]
    xs = [x for line in drawn for x in line.x if not log2_x or x > 0]
    ys = [y for line in drawn for y in line.y]
    if not xs or not ys:
        return ""
    if level is not None:
        ys.append(level[1])
    bars = [(y, spread) for line in drawn for y, spread in zip(line.y, line.spread, strict=False) if _is_bar(spread)]
    ends = [end for y, spread in bars for end in (y - spread, y + spread)]
    ys += [end for end in ends if end > 0 or min(ys) <= 0]  # what would end a logarithmic axis is cut
    across = _Log2(xs) if log2_x else _Linear(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    low, high, pixels = min(ys), max(ys), (_HEIGHT - _BOTTOM, _TOP)
    if log_y and low > 0 and high > 10 * low:
        up: _Linear = _Log(low, high, *pixels)
    else:  # from zero, where that is near or in sight
        is_near = 0 <= low < high / 3
        up = _Linear(0.0, 1.05 * high, *pixels) if is_near else _Linear(low, high, *pixels, pad=0.05)
    parts = [_axes(across, up, x_label)]
    if level is not None:
        y = up(level[1])
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for i, line in enumerate(drawn):
        parts.append(f'<g class="{_class(i)}">{_curve(line, across, up, marks=marks or len(line.x) == 1)}</g>')
    names = [(line.label, _class(i)) for i, line in enumerate(drawn)]
    if level is not None:
        names.append((level[0], "level"))
    legend = _legend(names) if len(names) > 1 else ""
    said = "; ".join(_in_words(line) for line in drawn[:8])
    picture = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}: {said}")}">'
        f"{''.join(parts)}</svg>"
    )
    note = f"<p>{escape(more + note)}</p>" if more or note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}{legend}{note}</figure>"


def by_nfe(metric: str, lines: Sequence[Line], *, level: tuple[str, float] | None) -> str:
    """The figure that compares samplers and methods: a metric over what an image costs."""
    return chart(
        f"{metric} by number of function evaluations", lines, x_label="function evaluations (NFE)", log2_x=True,
        marks=True, level=level,
    )


def _finite(line: Line) -> Line:
    spreads = line.spread or [None] * len(line.x)
    points = [point for point in zip(line.x, line.y, spreads, strict=True) if abs(point[0]) + abs(point[1]) < _LARGEST]
    x, y, spread = zip(*points, strict=True) if points else ([], [], [])
    return Line(line.label, [*map(float, x)], [*map(float, y)], spread)


def _thinned(line: Line) -> Line:
    """At most `_MAX_POINTS` points, each the mean of as many neighbours."""
    size = -(-len(line.x) // _MAX_POINTS)
    if size < 2:
        return line

    def means(values: Sequence[float]) -> list[float]:
        groups = (values[i : i + size] for i in range(0, len(values), size))
        return [math.fsum(value / len(group) for value in group) for group in groups]

    return Line(line.label, means(line.x), means(line.y))


class _Linear:
    """A range on a line of the picture, from the pixel of its least value to that of its greatest."""

    def __init__(self, low: float, high: float, first: int, last: int, *, pad: float = 0.0):
        if high - low <= max(1e-9 * max(abs(low), abs(high)), _SMALLEST):
            around = abs(low) / 2 or 1.0
            low, high = low - around, high + around
        pad *= high - low
        self._low, self._high, self._first, self._last = low - pad, high + pad, first, last

    def __call__(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._first + min(max(share, 0.0), 1.0) * (self._last - self._first)

    def ticks(self) -> list[float]:
        """Round numbers, at most five or so."""
        rough = (self._high - self._low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
        start = math.ceil(self._low / step - 1e-9)
        return [i * step for i in range(start, math.floor(self._high / step + 1e-9) + 1)]


class _Log(_Linear):
    """The same of the logarithm."""

    def __init__(self, low: float, high: float, first: int, last: int):
        super().__init__(math.log10(low), math.log10(high), first, last, pad=0.05)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log10(value) if value > 0 else self._low)

    def ticks(self) -> list[float]:
        """Decades, and where these are few, what lies between."""
        factors = (1,) if self._high - self._low > 3 else (1, 2, 5) if self._high - self._low > 1 else (1, 2, 3, 5, 7)
        decades = range(math.floor(self._low), math.ceil(self._high))
        values = [factor * 10.0**decade for decade in decades for factor in factors]
        every = -(-len(values) // 12)
        return [v for v in values[::every] if self._low <= math.log10(v) <= self._high]


class _Log2(_Linear):
    """Powers of two from left to right."""

    def __init__(self, values: Sequence[float]):
        super().__init__(math.log2(min(values)) - 0.3, math.log2(max(values)) + 0.3, _LEFT, _WIDTH - _RIGHT)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log2(value) if value > 0 else self._low)

    def ticks(self) -> list[float]:
        powers = [2.0**k for k in range(math.ceil(self._low), math.floor(self._high) + 1)]
        return powers[:: -(-len(powers) // 10)]


def _axes(across: _Linear, up: _Linear, x_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(_tick(value))}</text>')
    for value in across.ticks():
        parts.append(f'<text x="{across(value):.1f}" y="{bottom + 15}" text-anchor="middle">{_tick(value)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:g}{letter}"
    return f"{value:g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _curve(line: Line, across: _Linear, up: _Linear, *, marks: bool) -> str:
    points = [(across(x), up(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    parts = [f'<path d="{path}"/>']
    for (x, y), value, spread in itertools.zip_longest(points, line.y, line.spread):
        if _is_bar(spread):
            ends = up(value - spread), up(value + spread)
            parts.append(f'<path d="M{x:.1f} {ends[0]:.1f}L{x:.1f} {ends[1]:.1f}"/>')
        if marks:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return "".join(parts)


def _is_bar(spread: float | None) -> TypeGuard[float]:
    return spread is not None and 0 < spread < _LARGEST


def _legend(names: Sequence[tuple[str, str]]) -> str:
    swatch = '<svg viewBox="0 0 18 10" aria-hidden="true"><g class="{}"><line x1="0" x2="18" y1="5" y2="5"/></g></svg>'
    items = (f"<li>{swatch.format(kind)}{escape(name)}</li>" for name, kind in names)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _class(index: int) -> str:
    again, colour = divmod(index, COLOURS)
    return f"line c{colour}" + (" again" if again else "")


def _in_words(line: Line) -> str:
    if not line.x:
        return f"{line.label} without a finite number"
    first, last = (f"{number(line.y[i])} at {number(line.x[i])}" for i in (0, -1))
    return f"{line.label} {first}" + ("" if len(line.x) == 1 else f" to {last}")
