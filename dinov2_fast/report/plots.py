"""Curves and bars as SVG text; colours come from the page's style sheet, so both themes work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dinov2_fast.report.page import text

WIDTH, HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 10, 42
_BAR_CHART_WIDTH = 480
_BAR_HEIGHT, _BAR_GAP = 34, 14
_LETTER_WIDTH = 7.2  # of a name at 14 px, on average


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    """Shown in the legend; escaped."""
    points: Sequence[tuple[float, float | None]]
    """x and y in the order of x; None interrupts the line."""


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    name: str
    """Shown beside the bar; escaped."""
    value: float
    """Length of the bar, not negative."""
    emphasized: bool = False
    """Drawn in the accent colour."""


def line_chart(title: str, curves: Sequence[Curve], *, x_label: str = "step") -> str:
    """A chart of lines over a common x axis.

    Args:
        title: says what y is; escaped, also read out by screen readers.
        curves: at most 4, one colour each.
        x_label: under the x axis; escaped.

    Returns:
        An `<svg>` element; one that says so when there is nothing to draw.
    """
    finite = [
        (x, y) for curve in curves for x, y in curve.points if y is not None and math.isfinite(y)
    ]
    body: list[str] = []
    if not finite:
        middle = f'x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle"'
        body.append(f"<text {middle}>nothing was recorded</text>")
        return _svg(title, WIDTH, HEIGHT, body)
    x_ticks = ticks(min(x for x, _ in finite), max(x for x, _ in finite), 5)
    y_ticks = ticks(min(y for _, y in finite), max(y for _, y in finite), 5)
    x_low, x_high = min(x for x, _ in finite), max(max(x for x, _ in finite), x_ticks[-1])
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low or 1)
        up = (y - y_low) / (y_high - y_low or 1)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    for tick in y_ticks:
        y = place(x_low, tick)[1]
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" {_at("y", y)}/>')
        body.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x_ticks:
        if tick >= x_low:
            x = place(tick, y_low)[0]
            position = f'x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle"'
            body.append(f"<text {position}>{_number(tick)}</text>")
    position = f'x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle"'
    body.append(f'<text class="axis" {position}>{text(x_label)}</text>')
    for index, curve in enumerate(curves):
        for run in _runs(curve.points):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in run))
            if len(run) == 1:
                x, y = place(*run[0])
                body.append(f'<circle class="dot-{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>')
            else:
                body.append(f'<polyline class="curve curve-{index}" points="{path}"/>')
    if len(curves) > 1:
        body += _legend(curves)
    return _svg(title, WIDTH, HEIGHT, body)


def bar_chart(title: str, bars: Sequence[Bar], *, unit: str, highest: float) -> str:
    """Horizontal bars with their values.

    Args:
        title: says what is compared; escaped.
        bars: from top to bottom.
        unit: written behind each value; escaped.
        highest: value of a bar over the full width.
    """
    value_width = 70
    longest = max((len(bar.name) for bar in bars), default=0)
    label_width = min(max(150, 20 + round(_LETTER_WIDTH * longest)), 260)
    height = len(bars) * (_BAR_HEIGHT + _BAR_GAP) + _BAR_GAP
    full = _BAR_CHART_WIDTH - label_width - value_width
    body: list[str] = []
    for index, bar in enumerate(bars):
        y = _BAR_GAP + index * (_BAR_HEIGHT + _BAR_GAP)
        length = max(1.0, full * min(max(bar.value, 0.0) / highest, 1.0))
        middle = y + _BAR_HEIGHT / 2 + 5
        kind = "bar emphasized" if bar.emphasized else "bar"
        amount = f"{bar.value:.1f} {text(unit)}"
        body += [
            f'<text x="{label_width - 10}" y="{middle}" text-anchor="end">{text(bar.name)}</text>',
            f'<rect class="track" x="{label_width}" y="{y}" width="{full}" '
            f'height="{_BAR_HEIGHT}" rx="3"/>',
            f'<rect class="{kind}" x="{label_width}" y="{y}" width="{length:.1f}" '
            f'height="{_BAR_HEIGHT}" rx="3"/>',
            f'<text class="value" x="{label_width + full + 10}" y="{middle}">{amount}</text>',
        ]
    return _svg(title, _BAR_CHART_WIDTH, height, body)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers around a range: steps of 1, 2 or 5 times a power of ten.

    Args:
        low: smallest value shown; the first tick is at or below it.
        high: largest value shown; the last tick is at or above it.
        count: about how many ticks.
    """
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # a flat line, but for rounding
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Unbroken stretches of a line."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _legend(curves: Sequence[Curve]) -> list[str]:
    """Names with a stroke of their colour, upper right: falling curves leave that corner free."""
    widest = max(len(curve.name) for curve in curves)
    x = WIDTH - _RIGHT - 30 - 7.0 * widest
    body: list[str] = []
    for index, curve in enumerate(curves):
        y = _TOP + 14 + 18 * index
        body.append(
            f'<line class="curve curve-{index}" x1="{x:.0f}" x2="{x + 20:.0f}" {_at("y", y - 4)}/>'
        )
        body.append(f'<text x="{x + 26:.0f}" y="{y}">{text(curve.name)}</text>')
    return body


def _at(axis: str, value: float) -> str:
    return f'{axis}1="{value:.1f}" {axis}2="{value:.1f}"'


def _number(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.6g}"


def _svg(title: str, width: float, height: float, body: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}">'
        f"{''.join(body)}</svg>"
    )
