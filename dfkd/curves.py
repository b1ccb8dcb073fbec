"""Curves of a run: read from metrics.jsonl, thinned, drawn as inline SVG."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

POINTS = 400  # of a curve, at most
WIDTH, HEIGHT, LEFT, RIGHT, TOP, FLOOR = 320, 150, 52, 312, 10, 128  # of a chart, in its own units
NOT_SCALARS = ("phase", "step", "seconds", "images", "trained")

Point = tuple[int, float]  # step, value


def read_curves(path: str | Path) -> dict[str, dict[str, list[Point]]]:
    """Curves {phase: {scalar: points}} of a metrics.jsonl, by step; torn lines are left out.

    No file is no curve. Where a resumed run logged a step again the later line counts. A null becomes NaN:
    a gap in the curve.
    """
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for entry in entries(path):
        scalars = curves.setdefault(str(entry.get("phase", "run")), {})
        for name, value in entry.items():
            if name in NOT_SCALARS or isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                continue
            scalars.setdefault(name, {})[entry["step"]] = math.nan if value is None else float(value)
    return {
        phase: {name: sorted(points.items()) for name, points in scalars.items()}
        for phase, scalars in curves.items()
        if scalars
    }


def entries(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; torn ones are left out, no file has none."""
    return [entry for entry in whole_lines(path) if isinstance(entry.get("step"), int)]


def whole_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects that a file of JSON lines holds; torn ones are left out, no file has none."""
    path, found = Path(path), []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that died while writing it
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def thin(points: list[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` (>= 2) points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return points
    kept: list[Point] = []
    count = limit // 2
    for k in range(count):
        stretch = points[k * len(points) // count : (k + 1) * len(points) // count]
        finite = [(value, step) for step, value in stretch if math.isfinite(value)]
        if finite:
            kept += sorted({(step, value) for value, step in (min(finite), max(finite))})
        else:
            kept.append(stretch[0])  # a gap
    return kept


def chart(name: str, points: list[Point]) -> str:
    """One curve (at least one point) as an HTML figure; its axes name the extremes of value and step."""
    values = [value for _, value in points if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (math.nan, math.nan)
    first, last = points[0][0], points[-1][0]
    caption = f"<b>{escape(name)}</b> " + (f"last {_short(values[-1])}" if values else "no finite value")
    if gaps := len(points) - len(values):
        caption += f", {gaps} not finite"
    return (
        f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="curve of {escape(name)} over steps {first} to {last}">{_axes(first, last, low, high)}'
        f"{_line(thin(points), first, last, low, high)}</svg></figure>"
    )


def _axes(first: int, last: int, low: float, high: float) -> str:
    frame = ((LEFT, TOP, LEFT, FLOOR), (LEFT, FLOOR, RIGHT, FLOOR), (LEFT, TOP, RIGHT, TOP))
    lines = "".join(f'<line x1="{a}" y1="{b}" x2="{c}" y2="{d}"/>' for a, b, c, d in frame)
    labels = [(LEFT, HEIGHT - 6, "start", f"step {first}")]
    if last > first:
        labels.append((RIGHT, HEIGHT - 6, "end", str(last)))
    if high > low:
        labels += [(LEFT - 5, FLOOR + 3, "end", _short(low)), (LEFT - 5, TOP + 4, "end", _short(high))]
    elif high == low:
        labels.append((LEFT - 5, (TOP + FLOOR) // 2 + 3, "end", _short(low)))
    return lines + "".join(f'<text x="{x}" y="{y}" text-anchor="{side}">{t}</text>' for x, y, side, t in labels)


def _line(points: list[Point], first: int, last: int, low: float, high: float) -> str:
    """The points as polylines that break where a value is not finite; a lone point is a dot."""
    pieces: list[list[str]] = [[]]
    for step, value in points:
        if not math.isfinite(value):
            pieces.append([])
            continue
        x = (step - first) / (last - first) if last > first else 0.5
        y = (value - low) / (high - low) if high > low else 0.5
        pieces[-1].append(f"{LEFT + x * (RIGHT - LEFT):.1f},{FLOOR - y * (FLOOR - TOP):.1f}")
    marks = []
    for piece in filter(None, pieces):
        x_text, y_text = piece[0].split(",")
        dot = f'<circle cx="{x_text}" cy="{y_text}" r="2.5"/>'
        marks.append(f'<polyline points="{" ".join(piece)}"/>' if len(piece) > 1 else dot)
    return "".join(marks)


def _short(value: float) -> str:
    return f"{value:.4g}"
