"""What the figures of generalise.py come to, over models and then over seeds: its table and its plot."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from bookkeeping import with_deviation

Line = dict[str, Any]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A4 PTQ": ("ptq", {"weights": 4, "activations": 4}),
    "W2A4 PTQ": ("ptq", {"weights": 2, "activations": 4}),
    "50 % channels": ("prune", {"kind": "channels", "ratio": 0.5}),
}
CONTROLS = ("noise", "real")
SAMPLES = (1, 2, 3, 4)  # m'


def relative_bn(lines: Sequence[Line]) -> Callable[[Line], float | None]:
    """A line's batch-norm loss in units of real images' on the same model and seed; None where these are missing."""
    real = {(line["model"], line["seed"]): line["bn_l2"] for line in lines if shows(line, "images", "real")}

    def relative(line: Line) -> float | None:
        unit = real.get((line["model"], line["seed"]))
        return line["bn_l2"] / unit if unit else None

    return relative


def shows(line: Line, case: str, source: str | None = None) -> bool:
    """Whether a line is of a case, and of a source where one is given."""
    return line["case"] == case and source in (None, line["source"])


def over_seeds(
    lines: Sequence[Line],
    figure: Callable[[Line], float | None],
    over_models: Callable[[list[float]], float] = statistics.fmean,
) -> list[float]:
    """One value per seed: the mean (or other summary) over models of a figure of the lines; lines without it count
    nothing."""
    values: dict[int, list[float]] = {}
    for line in lines:
        value = figure(line)
        if value is not None:
            values.setdefault(line["seed"], []).append(value)
    return [over_models(of_models) for _, of_models in sorted(values.items())]


def columns(lines: Sequence[Line], source: str) -> dict[str, list[float]]:
    """What the table says of a source, by column: one value per seed."""
    own = [line for line in lines if line["source"] == source]
    images = [line for line in own if shows(line, "images")]
    held_out = [line for line in images if line["held_out"]]
    relative = relative_bn(lines)
    by_case = {
        case: over_seeds([line for line in own if shows(line, case)], lambda line: line["after"]) for case in CASES
    }
    return {
        "bn loss, zoo": over_seeds([line for line in images if not line["held_out"]], relative),
        "bn loss, held out": over_seeds(held_out, relative),
        "accuracy, held out": over_seeds(held_out, lambda line: line["accuracy"]),
        "accuracy, all": over_seeds(images, lambda line: line["accuracy"]),
        "spread": over_seeds(images, lambda line: line["accuracy"], statistics.pstdev),
        **{case: values for case, values in by_case.items() if values},
        "seconds": over_seeds(images, lambda line: line["training_seconds"]),
    }


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row per source, means over models as mean ± deviation over seeds."""
    sources = list(dict.fromkeys(line["source"] for line in lines))
    figures = {source: columns(lines, source) for source in sources}
    names = list(dict.fromkeys(name for of_source in figures.values() for name in of_source))
    rows = ["| source | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for source in sources:
        cells = [with_deviation(figures[source].get(name, []), ".2f" if "bn" in name else ".1f") for name in names]
        rows.append(f"| {source} | " + " | ".join(cells) + " |")
    naive = [line for line in lines if line["source"] == "real" and line.get("naive") is not None]
    of_case = {name: [line for line in naive if shows(line, name)] for name in names}
    cells = [with_deviation(over_seeds(of_case[n], lambda line: line["naive"]), ".1f") for n in names]
    rows.append("| naive, on real images | " + " | ".join(cells) + " |")
    before = {line["model"]: line["before"] for line in lines if line.get("before") is not None}
    whole = ", ".join(f"{model} {value:.2f} %" for model, value in sorted(before.items()))
    skipped = {f"{line['case']} of {line['model']}: {line['why']}" for line in lines if "why" in line}
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    tested = ", ".join(sorted({str(line["n"]) for line in lines if line["case"] in CASES and "n" in line}))
    notes = [f"Held out, before compression: {whole}; {tested or 'no'} test images. Seeds {seeds}."]
    if not any(line["source"] == "real" for line in lines):
        notes.append(
            "Batch-norm losses are in units of real images', and the naive row is on those: add real to --sources."
        )
    return "\n".join([*rows, "", *notes, *(f"Not done: {text}" for text in sorted(skipped))])


# --- the plot ---

SIZE, MARGIN = (300, 200), (52, 26, 12, 34)  # of a panel's axes; left, top, right, bottom of them
SERIES = {  # source name without its m', colour, dash
    "generator m={}": ("generator, mixed", "#1f6fb4", ""),
    "generator m={} unmixed": ("generator, unmixed", "#1f6fb4", "5 3"),
    "images m={}": ("images, mixed", "#c0501f", ""),
    "images m={} unmixed": ("images, unmixed", "#c0501f", "5 3"),
}
PANELS = ("bn loss, held out", "accuracy, held out", *CASES)


def plot(lines: Sequence[Line]) -> str:
    """SVG: a panel per measure against m'; teachers alone as rings at the left, controls as grey lines."""
    sources = list(dict.fromkeys(line["source"] for line in lines))
    figures = {source: columns(lines, source) for source in sources}
    shown = [name for name in PANELS if any(of_source.get(name) for of_source in figures.values())]
    width, height = SIZE[0] + MARGIN[0] + MARGIN[2], SIZE[1] + MARGIN[1] + MARGIN[3]
    parts = [panel(name, figures, (k % 3) * width, (k // 3) * height) for k, name in enumerate(shown)]
    rows = -(-len(shown) // 3)
    text = "".join(parts) + legend(rows * height + 14)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * width} {rows * height + 24}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>{text}</svg>\n'
    )


def panel(name: str, figures: Mapping[str, Mapping[str, list[float]]], left: float, top: float) -> str:
    """One measure of all sources; the y axis spans all but noise, which stands at its edge where it is beyond."""
    values = {source: of[name] for source, of in figures.items() if of.get(name)}
    inside = [value for source, of in values.items() if source != "noise" for value in of]
    low, high = min(inside, default=0.0), max(inside, default=1.0)
    high += (high - low or 1.0) * 0.05
    x0, y0 = left + MARGIN[0], top + MARGIN[1]

    def at(m: float) -> float:
        return x0 + SIZE[0] * m / (len(SAMPLES) + 0.5)

    def up(value: float) -> float:
        return y0 + SIZE[1] * (1 - (value - low) / (high - low))

    title = f"{name}, {'real images = 1' if 'bn' in name else '%'}"
    marks = [f'<text x="{x0}" y="{y0 - 12}" font-weight="bold">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        marks.append(f'<line x1="{x0}" x2="{x0 + SIZE[0]}" y1="{up(value):.1f}" y2="{up(value):.1f}" stroke="#ddd"/>')
        marks.append(f'<text x="{x0 - 5}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for m, label in ((0.4, "alone"), *((m, f"m' = {m}") for m in SAMPLES)):
        marks.append(f'<text x="{at(m):.1f}" y="{y0 + SIZE[1] + 16}" text-anchor="middle">{escape(label)}</text>')
    for source in (source for source in CONTROLS if source in values):
        y = up(min(max(statistics.fmean(values[source]), low), high))
        ends = f'x1="{x0}" x2="{x0 + SIZE[0]}" y1="{y:.1f}" y2="{y:.1f}"'
        marks.append(f'<line {ends} stroke="#888" stroke-dasharray="2 3"/>')
        words = f"{source} {statistics.fmean(values[source]):.4g}"
        marks.append(f'<text x="{x0 + SIZE[0]}" y="{y - 3:.1f}" text-anchor="end" fill="#666">{words}</text>')
    for template, (_, colour, dash) in SERIES.items():
        points = [(at(m), values[template.format(m)]) for m in SAMPLES if template.format(m) in values]
        marks.append(curve(points, up, colour, dash))
    for source in (source for source in values if source not in CONTROLS and " m=" not in source):
        colour = SERIES[f"{source.split()[0]} m={{}}"][1]
        x, y = at(0.3 if source.startswith("generator") else 0.5), up(statistics.fmean(values[source]))
        ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="none" stroke="{colour}">'
        marks.append(f"{ring}<title>{escape(source)}</title></circle>")
    return "".join(marks)


def curve(points: Sequence[tuple[float, list[float]]], up: Callable[[float], float], colour: str, dash: str) -> str:
    """Means joined by a line, each with a bar of one standard deviation over seeds either way."""
    style = f'stroke="{colour}" fill="none"'
    means = [(x, statistics.fmean(of), statistics.stdev(of) if len(of) > 1 else 0.0) for x, of in points]
    line = " ".join(f"{x:.1f},{up(mean):.1f}" for x, mean, _ in means)
    marks = [f'<polyline points="{line}" {style} stroke-width="1.6" stroke-dasharray="{dash}"/>']
    for x, mean, deviation in means:
        marks.append(f'<circle cx="{x:.1f}" cy="{up(mean):.1f}" r="2.5" fill="{colour}"/>')
        ends = f'y1="{up(mean - deviation):.1f}" y2="{up(mean + deviation):.1f}"'
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} {style}/>')
    return "".join(marks)


def legend(y: float) -> str:
    """What the lines and rings are."""
    marks = []
    for k, (name, colour, dash) in enumerate(SERIES.values()):
        x = MARGIN[0] + 180 * k
        line = f'<line x1="{x}" x2="{x + 28}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="1.6" '
        marks.append(f'{line}stroke-dasharray="{dash}"/><text x="{x + 34}" y="{y + 4}">{escape(name)}</text>')
    x = MARGIN[0] + 180 * len(SERIES)
    marks.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="none" stroke="black"/>')
    return "".join(marks) + f'<text x="{x + 10}" y="{y + 4}">one teacher of the zoo alone</text>'
