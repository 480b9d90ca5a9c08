"""Charts as SVG: where the points are, which axis, and what is no number."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mscm.report import charts
from mscm.report.charts import Line


def drawn(*lines: Line, **options) -> tuple[ElementTree.Element, list[np.ndarray]]:
    """The figure as XML, and of each line its points."""
    figure = ElementTree.fromstring(charts.chart("A title", lines, x_label="step", **options))
    paths = [group.find("path").get("d") for group in figure.find("svg").findall("g")]
    return figure, [np.array([[*map(float, point.split())] for point in re.split("[ML]", path)[1:]]) for path in paths]


def ticks(figure: ElementTree.Element, anchor: str = "end") -> dict[str, float]:
    """Of the vertical axis: label and place."""
    return {t.text: float(t.get("y")) - 4 for t in figure.iter("text") if t.get("text-anchor") == anchor}


def test_points_are_where_the_axes_say():
    """A value lies between the ticks in proportion; up is more, right is later."""
    figure, (points, _) = drawn(Line("a", [0, 50, 100], [2.0, 3.0, 4.0]), Line("b", [0, 100], [2.0, 4.0]))
    at = ticks(figure)
    np.testing.assert_allclose(points[:, 1], [at["2"], (at["2"] + at["4"]) / 2, at["4"]], atol=0.11)
    assert points[0, 0] < points[1, 0] < points[2, 0] and points[0, 1] > points[2, 1]
    np.testing.assert_allclose(points[1, 0], (points[0, 0] + points[2, 0]) / 2, atol=0.11)
    assert [item.text or item[0].tail for item in figure.find("ul")] == ["a", "b"]


@pytest.mark.parametrize(("values", "is_log"), [([1, 9], False), ([1, 11], True), ([0, 11], False), ([-1, 11], False)])
def test_a_factor_of_ten_is_on_a_log_axis(values, is_log):
    """Which shows equal factors as equal lengths; not where it was not asked for."""
    figure, (points,) = drawn(Line("a", [0, 1, 2], [*values, values[0] + 1.0]))
    low, high, other = points[:, 1]
    share = np.log(values[0] + 1) / np.log(values[1]) if is_log else 1 / (values[1] - values[0])
    np.testing.assert_allclose((other - low) / (high - low), share, atol=2e-3)
    _, (linear,) = drawn(Line("a", [0, 1, 2], [*values, values[0] + 1.0]), log_y=False)
    np.testing.assert_allclose(
        (linear[2, 1] - linear[0, 1]) / (linear[1, 1] - linear[0, 1]), 1 / (values[1] - values[0]), atol=2e-3
    )


def test_function_evaluations_are_on_an_axis_of_powers_of_two():
    figure, (points,) = drawn(Line("a", [1, 4, 16], [1.0, 2.0, 3.0], [0.5, None, 0.25]), log2_x=True, marks=True)
    np.testing.assert_allclose(np.diff(points[:, 0]), np.ptp(points[:, 0]) / 2, atol=0.11)
    group = figure.find("svg").find("g")
    assert len(group.findall("circle")) == 3 and len(group.findall("path")) == 3  # the line and two bars
    at = ticks(figure)
    bar = [*map(float, re.findall(r" ([\d.]+)", group.findall("path")[1].get("d")))]
    np.testing.assert_allclose(bar[0] - bar[1], (at["1"] - at["2"]), atol=0.21)
    assert list(ticks(figure, "middle")) == ["1", "2", "4", "8", "16", "step"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_no_number_is_left_out(bad):
    figure, (points,) = drawn(Line("a", [0, 1, 2], [1.0, bad, 2.0]))
    assert points.shape == (2, 2) and np.isfinite(points).all()
    assert charts.chart("A title", [Line("a", [0, 1], [bad, bad])], x_label="step") == ""


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-320, 0.0], [3.0, 3.0 + 1e-15], [-1e29, 1e29], [1e-29, 1e29]])
def test_any_range_has_an_axis(values):
    """One point, equal ones, and those at the ends of what numbers can be: all within the picture."""
    figure, (points,) = drawn(Line("a", [*range(len(values))], values), level=("real", values[0]))
    assert (points >= 0).all() and (points[:, 0] <= 360).all() and (points[:, 1] <= 220).all()
    assert 1 <= len(ticks(figure)) <= 12


def test_a_long_line_is_the_means_of_groups():
    """All points count; the picture stays small."""
    x = np.arange(10_000)
    text = charts.chart("A title", [Line("a", [*x], [*np.sin(x / 500)])], x_label="step")
    _, (points,) = drawn(Line("a", [*x], [*np.sin(x / 500)]))
    assert 200 < len(points) <= 300 and len(text) < 8_000
    middle = np.interp(180, points[:, 0], points[:, 1])
    assert points[:, 1].min() <= middle <= points[:, 1].max()


def test_names_are_text_whatever_they_are():
    """In the legend, for who cannot see it, and no more lines than a person tells apart."""
    name = '<script>alert("1")</script>'
    text = charts.chart(name, [Line(name, [0, 1], [1.0, 2.0])] * 40, x_label=name)
    figure = ElementTree.fromstring(text)
    assert figure.find("figcaption").text == name and "<script" not in text
    assert name in figure.find("svg").get("aria-label") and "1 at 0 to 2 at 1" in figure.find("svg").get("aria-label")
    assert len(figure.find("svg").findall("g")) == 24 and figure.find("p").text.startswith("16 more")
