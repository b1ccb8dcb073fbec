import base64
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dfkd.curves import chart, read_curves, thin
from dfkd.report import closing_table, write_report

VOID = {"meta", "img", "line", "polyline", "circle"}  # elements without an end tag, here
RESULTS: dict[str, Any] = {
    "teachers": {
        "wide": {
            "model": "dfkd:resnet20",
            "parameters": 272474,
            "accuracy": 98.148,
            "n": 540,
            "trained": True,
        },
        "<vgg>": {
            "model": "dfkd:vgg11",
            "parameters": 9225610,
            "accuracy": None,
            "n": None,
            "trained": False,
        },
    },
    "student": {
        "model": "dfkd:resnet8",
        "parameters": 78042,
        "accuracy": 96.1111,
        "n": 540,
        "interval": [94.13, 97.44],
        "agreement": None,
        "ratio": 0.2864,
    },
    "tasks": {"ptq": {"before": 98.1, "naive": 11.5, "after": 97.2, "n": 540}},
    "diversity": {"pixel_ratio": 0.41, "feature_ratio": 1.0},
    "seconds": {"total": 83.21, "teachers": 20.4, "synthesis": 60.0},
    "verdict": {
        "ok": False,
        "notes": ["images of a class look alike: set synthesis.losses.diversity=1 & rerun"],
    },
    "data_free": [
        {"source": "digits", "split": "train", "purpose": "train teacher", "n": 1257},
        {"source": "digits", "split": "test", "purpose": "evaluate", "n": 540},
    ],
    "device": "cpu",
    "seed": 0,
    "command": ["train.py", "recipe=digits"],
    "versions": {"torch": "2.15.0"},
}


class Page(HTMLParser):
    """A strict reader: every start tag is closed in order; keeps the text and the attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.stack[-1:] != ["style"] else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def write_run(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    lines = [{"phase": "generator", "step": k, "seconds": k / 2, "loss": 1 / (k + 1), "<b>": 1} for k in range(9)]
    lines += [{"phase": "student", "step": k, "seconds": k / 2, "kd": math.nan if k == 4 else k} for k in range(9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "stu')
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "config.yaml").write_text("name: digits\nnote: <script>alert(1)</script>\n")
    for step in range(500, 10500, 500):
        Image.new("RGB", (2, 2), (step // 50, 0, 0)).save(folder / "images" / f"generator_{step:06}.png")


def shown(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


def test_report_shows_every_part_and_needs_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "digits & co")
    page = shown(tmp_path / "digits & co")
    for text in (
        "digits & co",
        "dfkd:resnet20",
        "96.11",
        "94.13 to 97.44",
        "0.2864 of its teacher's",
        "272,474",
    ):
        assert text in page.text
    assert "set synthesis.losses.diversity=1 & rerun" in page.text
    assert "1,257 training images of digits, to train a teacher" in page.text
    assert "540 test images of digits, to evaluate" in page.text
    assert "train.py recipe=digits" in page.text
    assert "torch 2.15.0" in page.text
    assert len(page.all("svg")) == 3
    assert not [name for name, attrs in page.tags if name in ("script", "link", "iframe", "vgg")]
    sources = [image["src"] or "" for image in page.all("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in (tmp_path / "digits & co" / "report.html").read_text()


def test_report_shows_the_students_file(tmp_path: Path) -> None:
    student = RESULTS["student"] | {"export": {"file": "model.onnx", "latency_ms": 0.125}}
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"student": student}))
    text = Page(write_report(tmp_path).read_text()).text
    assert "Student: file to deploy" in text
    assert "0.125" in text


def test_report_escapes_what_it_is_given(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = shown(tmp_path)
    assert "<vgg>" in page.text
    assert "<script>alert(1)</script>" in page.text  # as text, not as a tag: Page has no such tag
    assert not page.all("script")
    assert "<b>" in page.text


def test_report_thins_the_image_grids_in_the_order_of_their_steps(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = shown(tmp_path)
    steps = [int(step) for step in re.findall(r"generator (\d+)", page.text)]
    assert len(steps) == 12
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (500, 10000)
    first = (page.all("img")[0]["src"] or "").split(",")[1]
    assert base64.b64decode(first) == (tmp_path / "images" / "generator_000500.png").read_bytes()


@pytest.mark.parametrize("missing", ["metrics.jsonl", "results.json", "config.yaml", "images", "everything"])
def test_report_works_with_parts_missing(missing: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        if missing == "everything" or path.is_relative_to(tmp_path / missing):
            path.rmdir() if path.is_dir() else path.unlink()
    page = shown(tmp_path)
    assert ("Teachers" in page.text) == (missing not in ("results.json", "everything"))
    assert ("Curves" in page.text) == (missing not in ("metrics.jsonl", "everything"))
    assert ("config.yaml" in page.text) == (missing not in ("config.yaml", "everything"))


@pytest.mark.parametrize("key", sorted(RESULTS))
def test_report_and_closing_table_work_with_results_missing_or_null(key: str, tmp_path: Path) -> None:
    for results in ({k: v for k, v in RESULTS.items() if k != key}, {**RESULTS, key: None}):
        (tmp_path / "results.json").write_text(json.dumps(results))
        shown(tmp_path)
        closing_table(results)


def test_report_says_when_no_real_image_was_opened(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, "data_free": []}))
    assert "This run opened no real image." in shown(tmp_path).text
    (tmp_path / "results.json").write_text("{}")
    assert "real image" not in shown(tmp_path).text  # unknown is not none
    (tmp_path / "results.json").write_text('{"data_free": [')
    assert "real image" not in shown(tmp_path).text


def test_report_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    before = write_report(tmp_path).read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    def full(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:100].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_curves_are_read_by_phase_and_step(tmp_path: Path) -> None:
    lines = [
        {"phase": "generator", "step": 1, "seconds": 0.1, "loss": 4.0, "note": "text", "flag": True},
        {"phase": "generator", "step": 3, "seconds": 0.3, "loss": 2.0},
        {"phase": "generator", "step": 2, "seconds": 0.2, "loss": 3, "lr": None},
        {"phase": "generator", "step": 3, "seconds": 0.4, "loss": 1.5},  # a resumed run logs the step again
        {"phase": "student", "step": 1, "seconds": 0.5, "kd": 0.5},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "m.jsonl").write_text(text + '\n[1]\n{"loss": 1}\n{"phase": "student", "step": 2, "kd": 0.')
    curves = read_curves(tmp_path / "m.jsonl")
    assert curves["generator"]["loss"] == [(1, 4.0), (2, 3.0), (3, 1.5)]
    assert math.isnan(curves["generator"]["lr"][0][1])
    assert curves["student"] == {"kd": [(1, 0.5)]}
    assert set(curves["generator"]) == {"loss", "lr"}
    assert read_curves(tmp_path / "none.jsonl") == {}


def test_thinning_keeps_extremes_order_and_gaps() -> None:
    points = [(k, math.sin(k / 50)) for k in range(5000)]
    points[1234] = (1234, 99.0)
    points[4321] = (4321, -99.0)
    points[2000:2200] = [(k, math.nan) for k in range(2000, 2200)]
    kept = thin(points)
    assert 200 < len(kept) <= 400
    assert {(1234, 99.0), (4321, -99.0)} <= set(kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert any(math.isnan(value) for _, value in kept)
    assert thin(points[:400]) == points[:400]


def spots(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, spot.split(","))) for spot in line.split()]  # type: ignore[misc]
        for line in re.findall(r'points="([^"]+)"', svg)
    ]


def test_chart_breaks_at_gaps_and_labels_its_axes() -> None:
    values = [1.0, 2.0, math.nan, 4.0, math.inf, 3.0, 5.0]
    svg = chart("loss", [(10 * k, value) for k, value in enumerate(values)])
    page = Page(svg)
    left, right = spots(svg)
    assert len(left) == len(right) == 2
    assert len(page.all("circle")) == 1  # the lone 4.0
    assert left[0][0] < left[1][0] < right[0][0] < right[1][0]
    assert left[0][1] > left[1][1] > right[0][1] > right[1][1]  # higher values lie higher up: smaller y
    assert "2 not finite" in page.text
    assert "last 5" in page.text
    for label in ("1", "5", "step 0", "60"):
        assert f">{label}</text>" in svg
    heights = {label: float(y) for y, label in re.findall(r'y="(\d+)" text-anchor="end">(\d+)<', svg)}
    assert heights["5"] == pytest.approx(right[1][1], abs=6)  # beside the points that have these values
    assert heights["1"] == pytest.approx(left[0][1], abs=6)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [math.nan], [math.nan, math.inf], [0.0, 1e-30], [-1e300, 1e300]])
def test_chart_draws_degenerate_curves_inside_its_frame(values: list[float]) -> None:
    svg = chart("x", list(enumerate(values)))
    Page(svg)
    assert "nan" not in svg
    assert "inf" not in svg.replace("no finite value", "").replace("not finite", "")
    for x, y in (spot for line in spots(svg) for spot in line):
        assert 0 <= x <= 320
        assert 0 <= y <= 150


def test_closing_table_has_a_row_per_model_with_figures_in_columns() -> None:
    lines = closing_table(RESULTS).splitlines()
    assert re.search(r"^teacher wide +dfkd:resnet20 +272,474 +98.15 +- +540$", lines[1])
    assert re.search(r"^teacher <vgg> +dfkd:vgg11 +9,225,610 +not measured +- +-$", lines[2])
    assert re.search(r"^student +dfkd:resnet8 +78,042 +96.11 +94.13 to 97.44 +540$", lines[3])
    assert len({line.index(" dfkd:") for line in lines[1:4]}) == 1
    assert lines[1].index("98.15") == lines[3].index("96.11")
    assert "student parameters over its teacher's: 0.2864" in lines
    assert any(line.startswith("ptq ") and "98.10" in line and "11.50" in line and "97.20" in line for line in lines)
    assert "seconds: total 83.21, teachers 20.4, synthesis 60" in lines
    assert "student's agreement" not in closing_table(RESULTS)
    assert "control" not in closing_table(RESULTS)
    assert closing_table({**RESULTS, "verdict": {"ok": True, "notes": []}}) == closing_table(
        {**RESULTS, "verdict": None}
    )
    bad = closing_table({**RESULTS, "verdict": {"ok": False, "notes": ["it fell", "it swings"]}})
    assert bad.splitlines()[-4:] == ["", "look at this before you use the result:", "- it fell", "- it swings"]
    control = {**RESULTS, "student": {**RESULTS["student"], "source": "real"}}
    assert "the student is a control, trained on real images" in closing_table(control).splitlines()


def test_closing_table_never_calls_agreement_an_accuracy() -> None:
    agreement = {"percent": 93.25, "kl": 0.1234, "n": 2560, "interval": [92.2, 94.2]}
    student = {**RESULTS["student"], "accuracy": None, "n": None, "interval": None, "agreement": agreement}
    lines = closing_table({**RESULTS, "student": student}).splitlines()
    assert "not measured" in lines[3]
    assert "93" not in lines[3]
    expected = "93.25 %, 95 % interval 92.2 to 94.2, KL 0.1234 nats, on 2,560 synthetic images"
    assert f"student's agreement with its teacher: {expected}" in lines
    assert any("agreement is no accuracy" in line for line in lines)
    both = closing_table({**RESULTS, "student": {**RESULTS["student"], "agreement": agreement}})
    assert expected in both
    assert "agreement is no accuracy" not in both
    unknown = closing_table({"student": {**student, "agreement": None}})
    assert "student's agreement with its teacher: not measured" in unknown
    assert closing_table({})


def test_every_figure_of_a_task_stands_under_its_own_head(tmp_path: Path) -> None:
    of = {name: {"percent": percent} for name, percent in (("naive", 31.0), ("repaired", 32.0), ("after", 33.0))}
    cost = {
        "before": {"bytes": 5000, "macs": 6000, "sparsity": 0.0},
        "after": {"bytes": 70, "macs": 80, "sparsity": 9.5},
    }
    task = {"input": "student", "source": "noise", "before": 91.0, "naive": 11.0, "repaired": 51.0, "after": 81.0}
    task |= {"interval": [80.0, 82.0], "n": 540, "agreement": of, "cost": cost, "seconds": 3.5}
    task |= {"intervals": {"before": [90.0, 92.0], "naive": [10.0, 12.0], "repaired": [50.0, 52.0]}}
    expected = {
        **{"task": "prune", "of": "student", "images": "noise", "before %": "91.00", "naive %": "11.00"},
        **{"after %": "81.00", "95 % interval": "80 to 82", "agreement %": "33"},
        **{"bytes of weights": "5,000 -> 70", "MACs": "6,000 -> 80", "s": "3.5", "before training %": "51"},
        **{"interval before": "90 to 92", "interval naive": "10 to 12", "zeros %": "9.5"},
    }
    (tmp_path / "results.json").write_text(json.dumps({"tasks": {"prune": task}}))
    page = write_report(tmp_path).read_text()
    heads, cells = (re.findall(f"<{tag}>(.*?)</{tag}>", page) for tag in ("th", "td"))
    assert dict(zip(heads, map(unescape, cells), strict=True)) == expected
    printed = [line for line in closing_table({"tasks": {"prune": task}}).splitlines() if line.startswith("prune")]
    assert re.split("  +", printed[0]) == list(expected.values())[:11]


def test_the_verdict_and_what_was_warned_of_are_shown(tmp_path: Path) -> None:
    warned = [{"step": 1200, "text": "images of a class <hardly> differ"}]
    for ok in (True, False):
        verdict = {"ok": ok, "notes": [] if ok else ["it swings"], "warnings": warned}
        (tmp_path / "results.json").write_text(json.dumps({"verdict": verdict}))
        page = shown(tmp_path)
        assert ("Nothing looks wrong." in page.text) == ok == ({"class": "verdict ok"} in page.all("div"))
        assert ("it swings" in page.text) != ok
        assert "While it trained:step 1,200: images of a class <hardly> differ" in page.text


def test_the_layers_of_a_task_are_shown(tmp_path: Path) -> None:
    layers = [{"layer": "conv1", "bits": [4, 8]}, {"layer": "head", "error": [0.25, 1, None]}]
    (tmp_path / "results.json").write_text(json.dumps({"tasks": {"ptq": {"layers": layers}}}))
    table = write_report(tmp_path).read_text().partition("<summary>ptq: layers</summary>")[2]
    assert re.findall("<th>(.*?)</th>", table) == ["layer", "bits", "error"]
    assert re.findall("<td>(.*?)</td>", table) == ["conv1", "4 to 8", "", "head", "", "0.25, 1, not measured"]


def test_grids_of_long_runs_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for step in (999_500, 1_000_000, 500):
        Image.new("RGB", (2, 2)).save(tmp_path / "images" / f"generator-{step:06}.png")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", write_report(tmp_path).read_text()) == [
        *("generator 500", "generator 999500", "generator 1000000")
    ]


def test_the_students_tiles_tell_its_mean_from_its_lowest(tmp_path: Path) -> None:
    quarter = {"of": "accuracy", "mean": 93.5, "deviation": 1.25, "lowest": 88.0, "images": 2000}
    agreement = {"percent": 97.25, "interval": [96.0, 98.0], "kl": 0.5, "n": 2560}
    student = {**RESULTS["student"], "last_quarter": quarter, "agreement": agreement}
    (tmp_path / "results.json").write_text(json.dumps({"student": student}))
    page = write_report(tmp_path).read_text()
    assert "<span>agreement with its teacher, %</span><b>97.25</b><span>95 % interval 96 to 98, KL 0.5" in page
    tile = (
        "<span>its mean accuracy in the last quarter, %</span><b>93.5</b><span>± 1.25, lowest 88, 2,000 images</span>"
    )
    assert tile in page


def test_the_share_of_a_phase_is_of_all_seconds(tmp_path: Path) -> None:
    seconds = {"teachers": 10.0, "distill": 30.0, "total": 40.0}
    (tmp_path / "results.json").write_text(json.dumps({"seconds": seconds}))
    cells = re.findall("<td>(.*?)</td>", write_report(tmp_path).read_text())
    assert cells == ["teachers", "10", "25 %", "distill", "30", "75 %", "total", "40", "100 %"]
