"""What looks wrong in a run: when it is said, once it is over and while it goes."""

import numpy as np
import pytest
import torch

from dfkd.inputs import COMPRESSIONS
from dfkd.verdict import generator_notes, last_quarter, moving_mean, student_notes, teacher_notes, verdict
from generators import ConvGenerator, PixelGenerator

SOUND = {"class_agreement_a": 90.0, "predicted_balance_a": 0.98, "feature_ratio": 0.6}


def make_generator(conditional: bool = True) -> ConvGenerator:
    return ConvGenerator(latent=4, classes=3, channels=1, size=8, width=4, conditional=conditional)


def asked(figures: dict[str, float], progress: float = 1.0, conditional: bool = True, **bn: tuple[float, float]) -> set:
    return set(generator_notes(make_generator(conditional), figures, bn, progress))


def test_nothing_is_said_of_a_sound_generator() -> None:
    assert asked(SOUND, a=(100.0, 20.0)) == set()


def test_nothing_is_said_of_noise() -> None:
    noise = PixelGenerator(classes=3, channels=1, size=8)
    assert generator_notes(noise, SOUND | {"predicted_balance_a": 0.2, "class_agreement_a": 30.0}, {}) == {}


@pytest.mark.parametrize(
    ("changed", "name", "share"),
    [
        ({"predicted_balance_a": 0.2}, "collapse a", 0.25),
        ({"feature_ratio": 0.02}, "alike", 0.25),
        ({"class_agreement_a": 30.0}, "class a", 0.9),  # a redraw costs it for a while
    ],
)
def test_what_looks_wrong_is_said_with_a_remedy_in_time(changed: dict[str, float], name: str, share: float) -> None:
    assert asked(SOUND | changed, progress=share - 0.1) == set()
    assert asked(SOUND | changed, progress=share) == {name}
    (text,) = generator_notes(make_generator(), SOUND | changed, {}).values()
    assert "synthesis." in text


def test_a_generator_without_labels_is_not_asked_for_classes() -> None:
    figures = SOUND | {"class_agreement_a": 10.0, "feature_ratio": 0.0}
    assert asked(figures, conditional=False) == set()
    assert asked(figures | {"predicted_balance_a": 0.1}, conditional=False) == {"collapse a"}


def test_statistics_that_cannot_be_matched_are_told_from_halfway() -> None:
    assert asked(SOUND, progress=0.4, a=(100.0, 90.0)) == set()
    assert asked(SOUND, progress=0.6, a=(100.0, 90.0)) == {"statistics a"}
    assert asked(SOUND, a=(100.0, 69.0)) == set()
    assert asked(SOUND, a=(100.0, 71.0)) == {"statistics a"}


def test_a_student_that_stops_agreeing() -> None:
    assert student_notes(0.6, best=0.9) == {}
    assert "from 90 to 40 %" in student_notes(0.4, best=0.9)["student"]
    assert student_notes(0.0, best=0.0) == {}  # nothing was learned yet


def test_one_hard_batch_is_no_fall_and_a_lasting_one_is() -> None:
    def told(agreements: list[float]) -> list[int]:
        mean, best, lines = None, 0.0, []
        for line, each in enumerate(agreements):
            mean = moving_mean(mean, each)
            best = max(best, mean)
            lines += [line] if student_notes(mean, best) else []
        return lines

    assert moving_mean(None, 0.7) == 0.7
    assert moving_mean(0.5, 1.0) == pytest.approx(0.6)
    assert told([0.9] * 10 + [0.3] + [0.9] * 10) == []
    # after k + 1 lines of 0.1 the mean is 0.1 + 0.8 * 0.8 ** (k + 1)
    first = next(k for k in range(9) if 0.1 + 0.8 * 0.8 ** (k + 1) < 0.45)
    assert told([0.9] * 10 + [0.1] * 9) == list(range(10 + first, 19))


def test_the_last_quarter_of_evaluations() -> None:
    values = np.random.default_rng(0).uniform(50, 90, 20)
    measured = [{"step": 37 + 50 * k, "accuracy": value, "images": 100} for k, value in enumerate(values, 1)]
    found = last_quarter(measured, 37 + 50 * 20, 37)
    assert found is not None
    assert (found["of"], found["evaluations"], found["images"]) == ("accuracy", 5, 100)
    expected = [values[15:].mean(), values[15:].std(ddof=1), values[15:].min()]
    assert [found["mean"], found["deviation"], found["lowest"]] == pytest.approx(expected)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_task_that_does_worse_than_rounding_alone_is_told(name: str) -> None:
    def noted(after: tuple[float, float], source: str = "generator") -> list[str]:
        middle = {"naive": {"percent": 99.0, "interval": [98.5, 99.4]}}
        agreement = {**middle, "after": {"percent": sum(after) / 2, "interval": list(after)}}
        source = "no data" if name == "udfc" and source == "generator" else source
        task = {"before": 90.0, "after": 89.0, "agreement": agreement, "source": source}
        return verdict({"tasks": {name: task}, "student": None}, {}, [])["notes"]

    (note,) = noted((92.0, 94.0))
    assert f"task {name} agrees with the network before on 93.0 % of synthetic images, and on 99.0 % without" in note
    assert noted((92.0, 94.0), "noise") == []  # a control
    assert noted((98.0, 98.6)) == noted((99.0, 99.9)) == []  # within what so many images can tell, and better


def test_training_that_made_a_pruned_network_worse_is_told() -> None:
    def noted(after: float, accuracy: float = 34.0, source: str = "generator") -> list[str]:
        of = {"naive": 25.0, "repaired": 96.0, "after": after}
        agreement = {name: {"percent": each, "interval": [each - 1, each + 1]} for name, each in of.items()}
        task = {"before": 100.0, "after": accuracy, "agreement": agreement, "source": source}
        return verdict({"tasks": {"prune": task}, "student": None}, {}, [])["notes"]

    (note,) = noted(36.0)
    assert note.endswith("on 96.0 % before it was trained: lower prune.lr, raise prune.steps or set it to 0")
    assert noted(95.0) == ["task prune lost 66 points: compress less, or train longer after it"]
    assert noted(98.0, accuracy=97.0) == noted(95.0, source="noise") == []
    assert [len(noted(98.0, accuracy=accuracy)) for accuracy in (90.5, 89.5)] == [0, 1]  # ten points are many


def test_without_test_images_a_ruined_network_is_told_by_its_agreement() -> None:
    def noted(percent: float, source: str = "generator") -> list[str]:
        of = {"percent": percent, "interval": [percent - 1, percent + 1]}
        agreement = {"naive": of, "repaired": None, "after": of}
        task = {"before": None, "after": None, "agreement": agreement, "source": source}
        return verdict({"tasks": {"ptq": task}, "student": None}, {}, [])["notes"]

    (note,) = noted(14.7)
    assert note.startswith("task ptq agrees with the network before on 15 % of synthetic images: compress less")
    assert noted(90.0) == noted(14.7, "noise") == []
    assert [len(noted(percent)) for percent in (80.5, 79.5)] == [0, 1]


def test_what_is_not_exported_is_told() -> None:
    task = {"before": 90.0, "after": 89.0, "export": {"error": "no operator for it"}}
    assert verdict({"tasks": {"ptq": task}, "student": None}, {}, [])["notes"] == [
        "task ptq is not exported: no operator for it"
    ]
    (note,) = verdict(results(export={"error": "no operator for it"}), {}, [])["notes"]
    assert note == "the student is not exported: no operator for it"
    (note,) = verdict(results(export={"agreement": 61.3}), {}, [])["notes"]
    assert note.startswith("the file of the student agrees with torch on 61.3 % of images")
    assert [verdict(results(export={"agreement": percent}), {}, [])["ok"] for percent in (99.6, 99.4)] == [True, False]


def test_the_last_quarter_of_few_or_no_evaluations() -> None:
    assert last_quarter([], 8) is None
    measured = [{"step": step, "agreement": value, "images": 9} for step, value in ((4, 80.0), (8, 70.0))]
    assert last_quarter(measured[:1], 8) is None  # taken up without evaluations: it is of no later quarter
    assert last_quarter([*measured, {"step": 9, "accuracy": 5.0, "images": 9}], 8) == last_quarter(measured, 8)
    found = last_quarter(measured, 8)
    assert found == {"of": "agreement", "mean": 70, "deviation": None, "lowest": 70, "evaluations": 1, "images": 9}


def test_the_last_quarter_is_one_of_the_training_however_often_it_was_measured() -> None:
    """A run that was taken up with fewer evaluations: every 10 of 300 steps, then two more."""
    steps = [*range(10, 170, 10), 200, 300]
    found = last_quarter([{"step": step, "accuracy": step / 10, "images": 9} for step in steps], 300)
    assert found is not None
    assert (found["mean"], found["evaluations"]) == (30, 1)
    found = last_quarter([{"step": step, "accuracy": 5.0, "images": 10 * step} for step in (80, 100)], 100)
    assert found is not None
    assert (found["images"], found["evaluations"]) == (1000, 2)  # taken up with a file of more images
    found = last_quarter([{"step": 1, "accuracy": 5.0, "images": 9}], 1)
    assert found is not None
    assert found["mean"] == 5


def named(order: list[int], right: int = 9, of: int = 10) -> dict[str, str]:
    """Notes on a teacher that calls `right` of `of` images of each class by its number in an order, the rest by the
    next."""
    labels = torch.arange(len(order)).repeat_interleave(of)
    guesses = torch.tensor(
        [order[k] if i < right else (order[k] + 1) % len(order) for k in range(len(order)) for i in range(of)]
    )
    return teacher_notes("a", labels, guesses, [f"class-{k}" for k in range(len(order))])


def test_a_teacher_that_knows_the_classes_in_another_order_is_told() -> None:
    (text,) = named([0, 2, 3, 1]).values()
    assert text.startswith("teacher a has 22 % of 40 test images, and 90 % where its outputs stand for")
    assert "output 2 for 'class-1', which is class 1 here" in text
    assert named([0, 1, 2, 3]) == {}
    assert named([0, 2, 3, 1], right=2, of=3) == {}  # too few images to tell
    assert set(named([1, 1, 1, 1], right=18, of=20)) == {"chance a"}  # it calls all of them one class
    assert set(named([1, 2, 3, 3])) == {"chance a"}  # two classes are one to it: that is no order
    assert set(named([1, 0], right=51, of=100)) == {"chance a"}  # a coin, that fell so


def test_a_teacher_that_guesses_is_told_and_a_weak_one_is_not() -> None:
    rng = torch.Generator().manual_seed(0)
    labels, guesses = (torch.randint(10, (1000,), generator=rng) for _ in range(2))
    (text,) = teacher_notes("a", labels, guesses, list("abcdefghij")).values()
    assert "% of 1000 test images, no more than by chance: check its weights, its mean and std" in text
    guesses[:100] = labels[:100]
    assert teacher_notes("a", labels, guesses, list("abcdefghij")) == {}
    assert teacher_notes("a", labels[:5] * 0, guesses[:5] * 0, ["one"]) == {}


@pytest.mark.parametrize(
    ("share", "of", "images", "told"),
    [
        (0.58, 2, 1000, False),  # five deviations above chance
        (0.38, 3, 1000, False),
        (0.70, 2, 10, False),  # too few to tell
        (0.50, 2, 1000, True),
        (0.10, 10, 540, True),
        (0.001, 1000, 1000, True),
        (0.0, 4, 240, True),
    ],
)
def test_chance_is_told_by_the_classes_and_the_number_of_images(share: float, of: int, images: int, told: bool) -> None:
    labels = torch.arange(images) % of
    guesses = (labels + 1 + torch.arange(images) // of % max(1, of - 1)) % of  # wrong, spread over the others
    right = torch.arange(images) < share * images
    notes = teacher_notes("a", labels, torch.where(right, labels, guesses), list(map(str, range(of))))
    assert ("chance a" in notes) == told


def test_one_that_always_says_the_commonest_class_is_told_whatever_its_accuracy() -> None:
    labels = (torch.arange(1000) >= 900).long()
    (text,) = teacher_notes("a", labels, labels * 0, ["common", "rare"]).values()
    assert "has 90.0 % of 1000 test images, no more than by chance" in text


def results(**student: object) -> dict:
    quarter = {"of": "accuracy", "mean": 90.0, "lowest": 85.1}
    teachers = {"a": {"accuracy": 95.0}, "b": {"accuracy": 99.0}, "c": {"accuracy": None}}
    sound = {"agreement": {"percent": 97.0}, "last_quarter": quarter, "accuracy": 84.0, "interval": [80.0, 85.1]}
    return {"tasks": {}, "student": {**sound, **student}, "teachers": teachers}


def test_the_verdict_of_a_sound_run_keeps_what_was_warned_of() -> None:
    warned = [{"step": 4, "text": "the generator has collapsed"}]
    assert verdict(results(), {}, warned) == {"ok": True, "notes": [], "warnings": warned}


def test_a_student_is_held_against_the_teachers_that_it_learned_from() -> None:
    far = {"accuracy": 70.0, "interval": [68.0, 72.0], "source": "generator"}
    assert not verdict(results(**far), {}, [], ["b"])["ok"]
    assert verdict(results(**far), {}, [], ["c"])["ok"]  # nobody knows how good that one is
    assert verdict(results(**far | {"source": "noise"}), {}, [])["ok"]  # a control


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"agreement": {"percent": 70.0}}, "agrees with its teacher on 70 %"),
        ({"last_quarter": {"of": "accuracy", "mean": 90.0, "lowest": 84.9}}, "swings"),
        ({"accuracy": 83.0, "interval": [80.0, 84.9]}, "has 83.0 % of the test images, its teachers 95.0 or more"),
    ],
)
def test_the_verdict_of_a_student_gone_wrong(student: dict, words: str) -> None:
    found = verdict(results(**student), {}, [])
    assert not found["ok"]
    assert words in found["notes"][0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_verdict_of_a_control_that_was_trained_on_the_test_images(split: str) -> None:
    found = verdict(results(opened=[{"split": split}]), {}, [])
    words = "distill or its input was trained on the test images: set data.train_root for a fair control"
    assert found["notes"] == ([words] if split == "test" else [])
    sound = {"before": 90.0, "after": 89.0, "source": "real", "opened": [{"split": split}]}
    found = verdict({"tasks": {"ptq": sound}, "student": None}, {}, [])
    assert found["notes"] == ([words.replace("distill", "ptq")] if split == "test" else [])


def test_a_control_need_not_agree_on_the_generators_images() -> None:
    assert verdict(results(agreement={"percent": 15.0}, source="real"), {}, [])["ok"]
    assert not verdict(results(agreement={"percent": 15.0}, source="generator"), {}, [])["ok"]


def test_the_verdict_says_what_looks_wrong_with_the_generator() -> None:
    assert verdict({"tasks": {}, "student": None}, {"alike": "hardly differ"}, [])["notes"] == ["hardly differ"]
