"""What a run leaves for people: report.html, self-contained, and the table printed at its end."""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dfkd.curves import chart, read_curves
from dfkd.whole import whole

GRIDS = 12  # image grids shown, at most: the folder has them all
UNMEASURED = "not measured"

CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --line: #d9dee6; --card: #fff;
  --page: #f4f6f9; --curve: #2563eb; --good: #15803d; --bad: #b45309; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a3b3; --line: #333c49;
  --card: #1b212a; --page: #12161c; --curve: #7aa7ff; --good: #4ade80; --bad: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem;
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; color: var(--soft); font-weight: 600; }
p { margin: .3rem 0; } .soft { color: var(--soft); overflow-wrap: anywhere; }
.tiles, .charts, .grids { display: grid; gap: .8rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); margin: 1.2rem 0; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }
.grids { grid-template-columns: repeat(auto-fill, minmax(min(19rem, 47%), 1fr)); }
.tile, figure, .verdict, .wide, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .7rem .9rem; margin: 0; }
.tile b { display: block; overflow-wrap: anywhere; font-size: 1.5rem; font-weight: 650; line-height: 1.3; }
.tile span, figcaption { color: var(--soft); font-size: .85rem; }
.verdict { border-left: 5px solid var(--bad); } .verdict.ok { border-left-color: var(--good); }
.verdict ul { margin: .3rem 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; width: fit-content; max-width: 100%; padding: .3rem .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 2.2rem .4rem 0; text-align: left; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .85rem; }
tr + tr > * { border-top: 1px solid var(--line); }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure img { border-radius: 4px; margin-bottom: .4rem; }
figcaption b { color: var(--ink); } figcaption { overflow-wrap: anywhere; }
polyline { fill: none; stroke: var(--curve); stroke-width: 1.5; stroke-linejoin: round; }
circle { fill: var(--curve); }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; } svg line { stroke: var(--line); }
pre { overflow-x: auto; font-size: .85rem; } summary { cursor: pointer; }
"""


def write_report(folder: str | Path) -> Path:
    """Write folder/report.html, atomically, from what the run has left there so far, and return its path.

    Reads metrics.jsonl, results.json, config.yaml and images/*.png; a part that is missing is left out.
    """
    folder = Path(folder)
    results = _results(folder / "results.json")
    name = folder.resolve().name
    sections = {
        "Teachers": _table(_named("teacher", results.get("teachers"))),
        "Student: file to deploy": _table(_pairs(_dict(results.get("student")).get("export"))),
        "Compression": _tasks(_dict(results.get("tasks"))),
        "Synthetic images": _grids(folder / "images"),
        "Diversity of the synthetic images": _table(_pairs(results.get("diversity"))),
        "Curves": _charts(folder / "metrics.jsonl"),
        "Real images": _ledger(results),
        "Time": _table(_phases(results.get("seconds"))),
        "Recipe": _recipe(folder / "config.yaml"),
    }
    body = _head(name, results) + _verdict(_dict(results.get("verdict"))) + _tiles(results)
    body += "".join(f"<h2>{title}</h2>\n{text}\n" for title, text in sections.items() if text)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} - dfkd</title><style>{CSS}</style></head>\n<body>\n{body}</body></html>\n"
    )
    path = folder / "report.html"
    with whole(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def closing_table(results: Mapping[str, Any]) -> str:
    """The plain-text table printed at the end of a run, from the layout of results.json.

    Accuracies are percent; what could not be measured says so. `student.ratio` is the student's parameters
    over its teacher's. What the verdict has against the result comes last.
    """
    student = _dict(results.get("student"))
    models = {f"teacher {name}": _dict(each) for name, each in _dict(results.get("teachers")).items()}
    models |= {"student": student} if student else {}
    rows = [["", "model", "parameters", "accuracy %", "95 % interval", "images"]]
    for title, each in models.items():
        accuracy = UNMEASURED if each.get("accuracy") is None else f"{each['accuracy']:.2f}"
        interval, n = ("-" if each.get(key) is None else _figure(each[key]) for key in ("interval", "n"))
        rows.append([title, _figure(each.get("model")), _figure(each.get("parameters")), accuracy, interval, n])
    lines = columns(rows, "<<>>>>")
    if student:
        lines += [f"the student {note}" for note in _origin(student)]
        lines.append(f"student parameters over its teacher's: {_figure(student.get('ratio'))}")
    if student.get("agreement") or (student and student.get("accuracy") is None):
        lines.append(f"student's agreement with its teacher: {_agreement(student.get('agreement'))}")
        if student.get("accuracy") is None:
            lines.append("agreement is no accuracy: what is lost on real images only labelled ones tell (data.dataset)")
    if tasks := _dict(results.get("tasks")):
        lines += ["", *columns(_task_rows(tasks))]
    if results.get("seconds"):
        lines.append(f"seconds: {_figure(results['seconds'])}")
    if notes := _dict(results.get("verdict")).get("notes"):
        lines += ["", "look at this before you use the result:", *(f"- {note}" for note in notes)]
    return "\n".join(line.rstrip() for line in lines)


def columns(rows: list[list[str]], sides: str = "") -> list[str]:
    """Rows of cells as lines of text: names to the left, numbers to the right."""
    sides = sides or "<" + ">" * (len(rows[0]) - 1)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in rows]


def _task_rows(tasks: Mapping[str, Any]) -> list[list[str]]:
    """Accuracy before, naively compressed and after, and what it cost, one task a row; the heads come first."""
    rows = [
        [
            "task",
            "of",
            "images",
            "before %",
            "naive %",
            "after %",
            "95 % interval",
            "agreement %",
            "bytes of weights",
            "MACs",
            "s",
        ]
    ]
    for name, task in ((name, _dict(task)) for name, task in tasks.items()):
        cost = _dict(task.get("cost"))
        before, after = _dict(cost.get("before")), _dict(cost.get("after"))
        interval = task.get("interval")
        agree = _dict(_dict(task.get("agreement")).get("after")).get("percent")
        rows.append(
            [
                name,
                *(_figure(task.get(key)) for key in ("input", "source")),
                *(UNMEASURED if task.get(key) is None else f"{task[key]:.2f}" for key in ("before", "naive", "after")),
                "-" if interval is None else _figure(interval),
                _figure(agree),
                *(f"{_figure(before.get(key))} -> {_figure(after.get(key))}" for key in ("bytes", "macs")),
                _figure(task.get("seconds")),
            ]
        )
    return rows


def _further(task: Mapping[str, Any]) -> dict[str, Any]:
    """What the printed table has no room for: before training, the other intervals, and zeros among the weights."""
    intervals, cost = _dict(task.get("intervals")), _dict(_dict(task.get("cost")).get("after"))
    return {
        "before training %": _figure(task.get("repaired")),
        "interval before": _figure(intervals.get("before")),
        "interval naive": _figure(intervals.get("naive")),
        "zeros %": _figure(cost.get("sparsity")),
    }


def _tasks(tasks: Mapping[str, Any]) -> str:
    """The tasks' table, what the figures mean, and per task its files and its layers."""
    if not tasks:
        return ""
    head, *rows = _task_rows(tasks)
    further = [_further(_dict(task)) for task in tasks.values()]
    text = _table([dict(zip(head, row)) | more for row, more in zip(rows, further)])
    text += (
        "<p class='soft'>naive: rounded to nearest, or pruned without repair. Before training: pruned and repaired, "
        "where it was trained afterwards. Agreement: with the model before, on "
        "synthetic images; it is no accuracy. Bytes: of all weights at their bits. MACs: multiply-accumulates of one "
        "image in convolutions and linear layers (half of torch's FLOPs).</p>\n"
    )
    for name, task in ((name, _dict(task)) for name, task in tasks.items()):
        if export := _dict(task.get("export")):
            text += f"<h3>{escape(name)}: file to deploy</h3>\n{_table(_pairs(export))}\n"
        if task.get("layers"):
            text += f"<details><summary>{escape(name)}: layers</summary>{_table(task['layers'])}</details>\n"
    return text


def _results(path: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # not there yet
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _figure(value: Any) -> str:
    """A figure of results.json as plain text: four digits, pairs as a range, dicts as `name value`."""
    if value is None:
        return UNMEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_figure(each)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (" to " if len(value) == 2 else ", ").join(map(_figure, value))
    return str(value)


def _agreement(agreement: Any) -> str:
    """Agreement as plain text under its own name: it is no accuracy."""
    figures = _dict(agreement)
    if figures.get("percent") is None:
        return UNMEASURED
    parts = [f"{_figure(figures['percent'])} %"]
    parts += [f"95 % interval {_figure(figures['interval'])}"] if figures.get("interval") else []
    parts += [f"KL {_figure(figures['kl'])} nats"] if figures.get("kl") is not None else []
    return ", ".join([*parts, f"on {_figure(figures.get('n'))} synthetic images"])


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows as an HTML table with a column for every key that occurs; nothing where there is no row."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    cells = ([_figure(row[column]) if column in row else "" for column in columns] for row in rows)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>\n" for row in cells)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _named(title: str, parts: Any) -> list[dict[str, Any]]:
    return [{title: name, **_dict(each)} for name, each in _dict(parts).items()]


def _pairs(parts: Any) -> list[dict[str, Any]]:
    return [{"measure": key.replace("_", " "), "value": value} for key, value in _dict(parts).items()]


def _phases(seconds: Any) -> list[dict[str, Any]]:
    total = _dict(seconds).get("total")
    rows = []
    for phase, value in _dict(seconds).items():
        share = f"{100 * value / total:.0f} %" if value is not None and total else ""
        rows.append({"phase": phase, "seconds": value, "share": share})
    return rows


def _head(name: str, results: Mapping[str, Any]) -> str:
    facts = [f"{key} {_figure(results[key])}" for key in ("device", "seed", "versions") if key in results]
    command = results.get("command") or ""
    command = command if isinstance(command, str) else " ".join(map(str, command))
    return (
        f"<h1>{escape(name)}</h1>\n<p class='soft'>{escape('; '.join(facts))}</p>\n"
        f"<p class='soft'><code>{escape(command)}</code></p>\n"
    )


def _verdict(verdict: Mapping[str, Any]) -> str:
    if not verdict:
        return ""
    word = "Nothing looks wrong." if verdict.get("ok") else "Look at this before you use the result:"
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in verdict.get("notes") or [])
    style = "verdict ok" if verdict.get("ok") else "verdict"
    warnings = "".join(
        f"<li>step {_figure(warning.get('step'))}: {escape(str(warning.get('text')))}</li>"
        for warning in map(_dict, verdict.get("warnings") or [])
    )
    text = word + (f"<ul>{notes}</ul>" if notes else "")
    text += f"<p>While it trained:</p><ul>{warnings}</ul>" if warnings else ""
    return f'<h2>Verdict</h2>\n<div class="{style}">{text}</div>\n'


def _tiles(results: Mapping[str, Any]) -> str:
    """The student at a glance."""
    student = _dict(results.get("student"))
    if not student:
        return ""
    sample = "" if student.get("n") is None else f"{_figure(student['n'])} images"
    if student.get("interval"):
        sample = f"95 % interval {_figure(student['interval'])}, {sample}"
    ratio = "" if student.get("ratio") is None else f"{_figure(student['ratio'])} of its teacher's"
    tiles = [
        ("student accuracy, %", student.get("accuracy"), sample),
        ("student parameters", student.get("parameters"), ratio),
        ("student model", student.get("model"), ", ".join(_origin(student))),
    ]
    if quarter := _dict(student.get("last_quarter")):
        spread = "" if quarter.get("deviation") is None else f"± {_figure(quarter['deviation'])}, "
        details = f"{spread}lowest {_figure(quarter.get('lowest'))}, {_figure(quarter.get('images'))} images"
        tiles.insert(1, (f"its mean {quarter.get('of')} in the last quarter, %", quarter.get("mean"), details))
    if agreement := _dict(student.get("agreement")):
        details = _agreement(agreement).partition(", ")[2]
        tiles.append(("agreement with its teacher, %", agreement.get("percent"), details))
    boxes = [
        f"<span>{escape(title)}</span><b>{escape(_figure(value))}</b><span>{escape(note)}</span>"
        for title, value, note in tiles
    ]
    return '<div class="tiles">' + "".join(f'<div class="tile">{box}</div>' for box in boxes) + "</div>\n"


def _origin(student: Mapping[str, Any]) -> list[str]:
    """What sets a student apart: that it saw no image of the generator, that it began with weights of its teacher."""
    controls = {"noise": "is a control, trained on noise", "real": "is a control, trained on real images"}
    notes = [controls[source]] if (source := str(student.get("source"))) in controls else []
    if selected := _dict(student.get("selected")):
        share = f"{100 * selected['share']:.3g} %"
        notes.append(f"began with weights of teacher {selected['teacher']} ({share} of its own)")
    return notes


def _grids(folder: Path) -> str:
    """The image grids in the order of their numbers, thinned evenly to GRIDS with the first and the last."""
    paths = sorted(
        folder.glob("*.png"),
        key=lambda path: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", path.stem)],
    )
    if len(paths) > GRIDS:
        paths = [paths[k * (len(paths) - 1) // (GRIDS - 1)] for k in range(GRIDS)]
    figures = []
    for path in paths:
        caption = escape(re.sub(r"[_-]+0*(?=.)", " ", path.stem))  # generator-000500: generator 500
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="grid of synthetic images: {caption}">'
        figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n")
    return f'<div class="grids">{"".join(figures)}</div>' if figures else ""


def _charts(path: Path) -> str:
    groups = []
    for phase, scalars in read_curves(path).items():
        charts = "\n".join(chart(name, points) for name, points in scalars.items())
        groups.append(f'<h3>{escape(phase)}</h3>\n<div class="charts">{charts}</div>\n')
    return "".join(groups)


def _ledger(results: Mapping[str, Any]) -> str:
    """What was opened, in plain words; nothing where no ledger was kept."""
    if not isinstance(results.get("data_free"), list):
        return ""
    lines = []
    for entry in map(_dict, results["data_free"]):
        n, split, source, purpose = (_figure(entry.get(key)) for key in ("n", "split", "source", "purpose"))
        words = {"train": "training", "train teacher": "train a teacher"}
        entry_text = f"{n} {words.get(split, split)} images of {source}, to {words.get(purpose, purpose)}"
        lines.append(f"<li>{escape(entry_text)}</li>\n")
    if not lines:
        return "<p>This run opened no real image.</p>"
    return f"<p>This run, or what it started from, opened:</p>\n<ul>{''.join(lines)}</ul>"


def _recipe(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
