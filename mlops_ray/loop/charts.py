"""Charts as inline SVG. Colours are the page's CSS variables, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from html import escape

WIDTH = 760

_HEAT_FULL = 0.5
_WEEK = timedelta(days=7)
_SHORT = timedelta(days=75)


@dataclass(frozen=True)
class Line:
    """One line: points (time, value), a CSS class for its colour, a name for its end."""

    name: str
    style: str
    points: Sequence[tuple[datetime, float]]


@dataclass(frozen=True)
class Mark:
    """Something that happened: a vertical line with a label above; ``hint`` shows on hovering."""

    at: datetime
    label: str
    hint: str
    style: str


@dataclass(frozen=True)
class _Frame:
    """The plot area and the values at its edges."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.right - self.left)

    def up(self, value: float) -> float:
        low, high = self.y
        return self.bottom - (value - low) / ((high - low) or 1) * (self.bottom - self.top)


def line_chart(
    lines: Sequence[Line], marks: Sequence[Mark], start: datetime, end: datetime, label: str
) -> str:
    """Return lines over time with marks. ``label`` says what is shown, for screen readers."""
    height = 320
    values = [value for line in lines for _, value in line.points]
    if not values:
        return _nothing()
    ticks = _ticks(min(values), max(values))
    frame = _Frame(
        44, 34, WIDTH - 64, height - 28, (start.timestamp(), end.timestamp()), (ticks[0], ticks[-1])
    )
    digits = max(2, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    if any(abs(round(tick, digits) - tick) > 1e-9 for tick in ticks):
        digits += 1
    parts = [_rule(frame, tick, f"{tick:.{digits}f}") for tick in ticks]
    parts += [_moment(frame, at, text, height) for at, text in _moments(start, end)]
    parts += [_mark(frame, mark) for mark in marks]
    parts += [_line(frame, line) for line in lines]
    parts += _end_labels(frame, lines)
    return _svg(height, label, parts)


def heatmap(
    rows: Sequence[str],
    columns: Sequence[datetime],
    values: Sequence[Sequence[float | None]],
    threshold: float,
    label: str,
) -> str:
    """Return a heatmap [rows][columns]; cells of ``threshold`` or more have a colour of their own."""
    if not rows or not columns:
        return _nothing()
    row_height, left, top = 15, 196, 8
    height = top + row_height * len(rows) + 26
    cell = (WIDTH - left - 8) / len(columns)
    parts = []
    for r, name in enumerate(rows):
        y = top + r * row_height
        parts.append(
            f'<text x="{left - 8}" y="{y + 11}" class="tick" text-anchor="end">'
            f"{escape(_short(name))}<title>{escape(name)}</title></text>"
        )
        parts += _heat_row(name, columns, values[r], threshold, left, y, cell, row_height)
    parts += _heat_axis(columns, left, cell, height)
    return _svg(height, label, parts)


def calibration_chart(bins: Sequence[tuple[float, float, int]], label: str) -> str:
    """Return mean score against share of positives, (score, share, rows); areas are rows."""
    if not bins:
        return _nothing()
    size = 340
    frame = _Frame(44, 12, size - 12, size - 40, (0, 1), (0, 1))
    ticks = (0, 0.2, 0.4, 0.6, 0.8, 1)
    parts = [_rule(frame, tick, f"{tick:.1f}") for tick in ticks]
    parts += [
        _text(frame.across(tick), frame.bottom + 16, f"{tick:.1f}", "tick", "middle")
        for tick in ticks
    ]
    parts.append(
        f'<line class="ideal" x1="{frame.left}" y1="{frame.bottom}" '
        f'x2="{frame.right}" y2="{frame.top}"/>'
    )
    path = " ".join(f"{frame.across(s):.1f},{frame.up(h):.1f}" for s, h, _ in bins)
    parts.append(f'<polyline class="line loop" points="{path}"/>')
    most = max(rows for _, _, rows in bins)
    for score, share, rows in bins:
        radius = 3 + 8 * math.sqrt(rows / most)
        hint = f"score {score:.3f}, share {share:.3f}, {rows:,} rows"
        parts.append(
            f'<circle class="dot loop" cx="{frame.across(score):.1f}" cy="{frame.up(share):.1f}" '
            f'r="{radius:.1f}"><title>{hint}</title></circle>'
        )
    parts.append(_text((frame.left + frame.right) / 2, size - 6, "mean score", "tick", "middle"))
    return _svg(size, label, parts, size)


def _line(frame: _Frame, line: Line) -> str:
    points = [(frame.across(t.timestamp()), frame.up(v)) for t, v in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="7">'
        f"<title>{escape(line.name)} · {t:%d %b} · {v:.3f}</title></circle>"
        for (x, y), (t, v) in zip(points, line.points, strict=True)
    )
    return f'<polyline class="line {line.style}" points="{path}"/>{dots}'


def _end_labels(frame: _Frame, lines: Sequence[Line]) -> Iterable[str]:
    """Name each line at its end; names that would overlap are moved apart."""
    ends = sorted((frame.up(line.points[-1][1]), line) for line in lines if line.points)
    last = -math.inf
    for y, line in ends:
        last = max(y, last + 15)
        yield _text(frame.right + 6, last + 4, line.name, f"name {line.style}", "start")


def _mark(frame: _Frame, mark: Mark) -> str:
    x = frame.across(mark.at.timestamp())
    hint = f"<title>{escape(mark.hint)}</title>"
    return (
        f'<g class="mark {mark.style}">{hint}'
        f'<line x1="{x:.1f}" y1="{frame.top - 6}" x2="{x:.1f}" y2="{frame.bottom}"/>'
        f'<rect class="hit" x="{x - 5:.1f}" y="{frame.top - 24}" width="10" '
        f'height="{frame.bottom - frame.top + 24:.0f}"/>'
        f'<text x="{x:.1f}" y="{frame.top - 11}" text-anchor="middle">{escape(mark.label)}</text></g>'
    )


def _rule(frame: _Frame, value: float, text: str) -> str:
    y = frame.up(value)
    return (
        f'<line class="rule" x1="{frame.left}" y1="{y:.1f}" x2="{frame.right}" y2="{y:.1f}"/>'
        + _text(frame.left - 8, y + 4, text, "tick", "end")
    )


def _moment(frame: _Frame, at: datetime, text: str, height: float) -> str:
    x = frame.across(at.timestamp())
    return (
        f'<line class="rule" x1="{x:.1f}" y1="{frame.bottom}" x2="{x:.1f}" y2="{frame.bottom + 5}"/>'
        + _text(x + 2, height - 8, text, "tick", "start")
    )


def _heat_row(
    name: str,
    columns: Sequence[datetime],
    values: Sequence[float | None],
    threshold: float,
    left: float,
    y: float,
    cell: float,
    row_height: float,
) -> Iterable[str]:
    for c, (at, value) in enumerate(zip(columns, values, strict=True)):
        if value is None:
            continue
        over = value >= threshold
        opacity = 0.3 + 0.7 * min(value / _HEAT_FULL, 1) if over else 0.06 + 0.5 * value / threshold
        style = "heat over" if over else "heat"
        yield (
            f'<rect class="{style}" x="{left + c * cell:.1f}" y="{y}" width="{cell - 1:.1f}" '
            f'height="{row_height - 1}" fill-opacity="{opacity:.2f}">'
            f"<title>{escape(name)} · {at:%d %b %Y} · PSI {value:.3f}</title></rect>"
        )


def _heat_axis(
    columns: Sequence[datetime], left: float, cell: float, height: float
) -> Iterable[str]:
    seen = -1
    for c, at in enumerate(columns):
        if at.month != seen:
            seen = at.month
            yield _text(left + c * cell, height - 8, f"{at:%b}", "tick", "start")


def _svg(height: float, label: str, parts: Iterable[str], width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _nothing() -> str:
    return '<p class="quiet">Nothing was measured.</p>'


def _short(name: str, most: int = 30) -> str:
    """Leave out the middle of a long name: its ends tell features of one view apart."""
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-half:]}"


def _ticks(low: float, high: float) -> list[float]:
    """Return round values that enclose [low, high], about five of them."""
    span = max(high - low, 0.01)
    magnitude = 10 ** math.floor(math.log10(span / 4))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude * 5 >= span)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [tick * step for tick in range(first, max(last, first + 1) + 1)]


def _moments(start: datetime, end: datetime) -> Iterable[tuple[datetime, str]]:
    """Return the months, or in a short period the weeks, and their names."""
    if end - start < _SHORT:
        for week in range((end - start) // _WEEK + 1):
            yield start + week * _WEEK, f"{start + week * _WEEK:%-d %b}"
        return
    at = start.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    while at < end:
        if at >= start:
            yield at, f"{at:%b}"
        at = at.replace(year=at.year + at.month // 12, month=at.month % 12 + 1)
