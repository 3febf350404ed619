from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2_fast.report.plots import HEIGHT, WIDTH, Bar, Curve, bar_chart, line_chart, ticks

HOSTILE = '<script>alert(1)</script>"&\n\x1b[31m'


def _points(svg: str) -> list[list[tuple[float, float]]]:
    """Corners of every polyline."""
    lines = [node for node in ET.fromstring(svg).iter("polyline")]
    return [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        for line in lines
    ]


def test_a_line_runs_through_its_points_from_left_to_right_and_upwards():
    svg = line_chart("loss", [Curve("a", [(0, 0.0), (5, 1.0), (10, 2.0)])])
    (corners,) = _points(svg)
    (x0, y0), (x1, y1), (x2, y2) = corners
    assert x0 < x1 < x2
    assert y0 > y1 > y2  # y grows downwards in SVG
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_values_that_are_missing_or_not_finite_interrupt_the_line():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 2.0), (4, 3.0), (5, math.nan), (6, 1.0)]
    svg = line_chart("loss", [Curve("a", points)])
    assert [len(corners) for corners in _points(svg)] == [2, 2]
    assert len(list(ET.fromstring(svg).iter("circle"))) == 1  # the last point stands alone
    assert "nan" not in svg


@pytest.mark.parametrize("points", [[], [(1, None)], [(1, math.inf)]])
def test_a_chart_without_values_says_so(points: list):
    assert "nothing was recorded" in line_chart("loss", [Curve("a", points)])


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(-1e30, 1e30)), min_size=1, max_size=20))
def test_every_point_lies_inside_the_drawing(points: list[tuple[int, float]]):
    points.sort(key=lambda point: point[0])
    svg = line_chart("loss", [Curve("a", points)])
    for corners in _points(svg):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in corners)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 9))
def test_ticks_enclose_the_range_evenly_and_are_few(low: float, span: float, count: int):
    high = low + span
    values = ticks(low, high, count)
    # Not visible, and what multiples of a step lose when they are written as floats.
    slack = 1e-6 * (values[-1] - values[0]) + 4 * math.ulp(max(map(abs, values)))
    assert values[0] <= low + slack
    assert values[-1] >= high - slack
    assert 2 <= len(values) <= 2 * count + 2
    steps = [b - a for a, b in pairwise(values)]
    assert max(steps) - min(steps) <= slack


def test_ticks_are_round_numbers():
    assert ticks(0.0, 600.0, 5) == [0, 200, 400, 600]
    assert ticks(3.0, 3.0, 3)[0] < 3.0 < ticks(3.0, 3.0, 3)[-1]


def test_names_are_escaped_everywhere():
    svg = line_chart(HOSTILE, [Curve(HOSTILE, [(0, 1.0), (1, 2.0)])] * 2, x_label=HOSTILE)
    svg += bar_chart(HOSTILE, [Bar(HOSTILE, 1.0)], unit=HOSTILE, highest=2.0)
    assert "<script" not in svg
    assert "\x1b" not in svg
    assert svg.count("&lt;script&gt;") >= 4


def test_bars_are_proportional_to_their_values():
    svg = bar_chart("x", [Bar("a", 25.0), Bar("b", 50.0, emphasized=True)], unit="%", highest=100)
    rects = {
        node.attrib["class"]: float(node.attrib["width"])
        for node in ET.fromstring(svg).iter("rect")
    }
    assert rects["bar emphasized"] == pytest.approx(2 * rects["bar"])
    assert rects["track"] == pytest.approx(4 * rects["bar"])
    assert "25.0 %" in svg


@pytest.mark.parametrize("name", ["raw pixels", "ViT-S bf16 64k GPU native"])
def test_names_of_bars_are_not_cut(name: str):
    svg = ET.fromstring(bar_chart("x", [Bar(name, 1.0)], unit="x", highest=1.0))
    (label,) = (node for node in svg.iter("text") if node.text == name)
    assert float(label.attrib["x"]) >= 7 * len(name)  # 7 px are an average letter's
