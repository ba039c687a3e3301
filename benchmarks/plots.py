"""The report's figures as inline SVG: stacked bars with whiskers, and lines with bands."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from markupsafe import Markup

WIDTH = 1000
_LABELS, _VALUES = 190, 120  # room for the names at the left, for the figures at the right
_BAR, _GAP = 26, 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a bar, in seconds."""

    name: str
    colour: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BarLine:
    """One bar: its parts from the left, the figure written beside it, and that figure's interval when it is known."""

    name: str
    parts: Sequence[Part]
    seconds: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A value at each step, in seconds, with the band that half of the values lie in."""

    name: str
    colour: str
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def stacked_bars(bars: Sequence[BarLine], *, label: str) -> Markup:
    """Horizontal bars on a common scale from zero."""
    longest = max(max(sum(part.seconds for part in bar.parts), bar.high or 0.0) for bar in bars)
    ticks = nice_ticks(longest)
    end = max(longest, ticks[-1])
    scale = (WIDTH - _LABELS - _VALUES) / end
    bottom = len(bars) * (_BAR + _GAP)
    text = [_grid(_LABELS + tick * scale, bottom, _tick_text(tick)) for tick in ticks]
    text += [_bar(bar, index * (_BAR + _GAP) + _GAP // 2, scale) for index, bar in enumerate(bars)]
    return _figure(text, bottom + 26, label)


def line_plot(lines: Sequence[Line], *, label: str, height: int = 300) -> Markup:
    """Lines over the steps 1 … n, on a scale from zero."""
    left, right, top, bottom = 70, 16, 12, height - 44
    ticks = nice_ticks(max(max(line.high) for line in lines))
    count = max(len(line.middle) for line in lines)
    end = max(max(max(line.high) for line in lines), ticks[-1])

    def place(step: int, seconds: float) -> str:
        x = left + (WIDTH - left - right) * (step / (count - 1) if count > 1 else 0.5)
        return f"{x:.1f},{bottom - (bottom - top) * seconds / end:.1f}"

    text = []
    for tick in ticks:
        y = bottom - (bottom - top) * tick / end
        text.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick)}</text>')
    for step in step_labels(count):
        x = place(step, 0).split(",")[0]
        text.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{step + 1}</text>')
    text.append(
        f'<text x="{(left + WIDTH - right) / 2}" y="{height - 4}" text-anchor="middle">network evaluation</text>'
    )
    for line in lines:
        band = [place(step, value) for step, value in enumerate(line.high)]
        band += [place(step, value) for step, value in reversed(list(enumerate(line.low)))]
        points = [place(step, value) for step, value in enumerate(line.middle)]
        text.append(f'<polygon points="{" ".join(band)}" fill="{line.colour}" opacity="0.16"/>')
        text.append(f'<polyline class="curve" points="{" ".join(points)}" stroke="{line.colour}"/>')
        text += [_dot(point, line.colour) for point in points]
    return _figure(text, height, label)


def nice_ticks(largest: float) -> list[float]:
    """Round values from zero to at least nine tenths of `largest`, four to eight of them."""
    if not largest > 0:
        return [0.0, 1.0]
    power = 10.0 ** np.floor(np.log10(largest / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if largest / (power * factor) <= 6)
    return [float(index * step) for index in range(int(np.floor(largest / step + 0.1)) + 1)]


def step_labels(count: int) -> list[int]:
    """The steps to label, first and last among them, at most about a dozen."""
    stride = max(1, (count + 9) // 10)
    return sorted({*range(0, max(count - stride // 2 - 1, 1), stride), count - 1})


def seconds_text(seconds: float) -> str:
    """A duration in the unit that reads best, to three figures."""
    if seconds == 0:
        return "0"
    value, unit = (seconds * 1000, "ms") if seconds < 1 else (seconds, "s")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def _tick_text(seconds: float) -> str:
    if seconds == 0:
        return "0"
    return f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"


def _bar(bar: BarLine, top: int, scale: float) -> str:
    middle = top + _BAR / 2
    starts = accumulate((part.seconds for part in bar.parts), initial=0.0)
    text = [
        f'<text class="name" x="{_LABELS - 14}" y="{middle + 5}" text-anchor="end">{Markup.escape(bar.name)}</text>'
    ]
    for start, part in zip(starts, bar.parts, strict=False):
        text.append(
            f'<rect x="{_LABELS + start * scale:.1f}" y="{top}" width="{part.seconds * scale:.2f}" height="{_BAR}" '
            f'fill="{part.colour}"><title>{Markup.escape(part.name)}: {seconds_text(part.seconds)}</title></rect>'
        )
    total = sum(part.seconds for part in bar.parts)
    end = _LABELS + max(total, bar.high or 0.0) * scale
    if bar.low is not None and bar.high is not None:
        a, b = _LABELS + bar.low * scale, _LABELS + bar.high * scale
        ends = "".join(f"M{x:.1f},{middle - 6}V{middle + 6}" for x in (a, b))
        text.append(f'<path class="whisker" d="M{a:.1f},{middle}H{b:.1f}{ends}"/>')
    text.append(f'<text class="value" x="{end + 10:.1f}" y="{middle + 5}">{seconds_text(bar.seconds)}</text>')
    return "".join(text)


def _grid(x: float, bottom: int, label: str) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>'
        f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'
    )


def _dot(point: str, colour: str) -> str:
    x, y = point.split(",")
    return f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'


def _figure(parts: Sequence[str], height: int, label: str) -> Markup:
    name = Markup.escape(label)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>')
