import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfkd.data import RealImages
from dfkd.errors import UserError
from dfkd.evaluate import Accuracy, accuracy, agreement, diversity, wilson


class FirstPixel(nn.Module):
    """Names the class that the first pixel spells: level k of 255 is class k."""

    def __init__(self, classes: int, offset: int = 0) -> None:
        super().__init__()
        self.classes, self.offset = classes, offset
        self.dropout = nn.Dropout(0.9)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        self.batches.append(len(images))
        level = (images[:, 0, 0, 0] * 255).round().long() + self.offset
        return self.dropout(10 * torch.eye(self.classes)[level % self.classes])


def real(levels: list[int], labels: list[int], classes: int = 3) -> RealImages:
    images = torch.full((len(levels), 1, 4, 4), 255, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(levels, dtype=torch.uint8)
    return RealImages(images, torch.tensor(labels), [str(k) for k in range(classes)], "test images")


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (Wilson without continuity correction)
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_wilson_interval_is_the_published_one(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=0.006)


def test_wilson_bounds_are_the_shares_that_a_score_test_just_rejects() -> None:
    for hits, n in [(1, 10), (950, 1000), (5000, 10000)]:
        for bound in wilson(hits, n):
            p = bound / 100
            assert abs(hits / n - p) / math.sqrt(p * (1 - p) / n) == pytest.approx(1.959964, rel=1e-6)
    assert wilson(540, 540)[1] == pytest.approx(100, abs=1e-9)
    assert wilson(0, 7)[0] == pytest.approx(0, abs=1e-9)


def test_accuracy_counts_by_hand() -> None:
    data = real([0, 0, 0, 0, 1, 2, 2, 0], [0, 0, 0, 0, 1, 2, 1, 1])
    model = FirstPixel(3)
    found = accuracy(model, data, device="cpu", batch_size=3)
    assert model.batches == [3, 3, 2]
    assert found == Accuracy(75.0, 8, wilson(6, 8))


def test_accuracy_is_of_the_evaluation_mode_and_gives_the_training_mode_back() -> None:
    model = FirstPixel(3).train()
    model.dropout.eval()
    accuracy(model, real([0], [0]), device="cpu")
    assert model.training
    assert not model.dropout.training
    model.dropout.train()
    assert accuracy(model, real([1] * 200, [1] * 200), device="cpu").percent == 100  # dropout would hit 90 %
    with pytest.raises(UserError, match="4 logits"):
        accuracy(FirstPixel(4), real([0], [0]), device="cpu")
    assert model.training


def test_accuracy_runs_in_the_given_precision() -> None:
    seen = []

    class Linear(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images.flatten(1))
            seen.append(logits.dtype)
            return logits

    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    accuracy(Linear(16, 3), real([0, 1], [0, 1]), device="cpu", autocast=bf16)
    assert seen == [torch.bfloat16]


def test_accuracy_does_not_count_broken_logits() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), 3)
            logits[1, 2] = math.nan
            return logits

    with pytest.raises(UserError, match="NaN or infinite for 1 of 4 images"):
        accuracy(Broken(), real([0] * 4, [0] * 4), device="cpu")
    with pytest.raises(UserError, match="the teacher's logits"):
        agreement(FirstPixel(3), Broken(), [torch.zeros(4, 1, 4, 4)])
    with pytest.raises(UserError, match="holds no image"):
        accuracy(Broken(), RealImages(torch.zeros(0, 1, 4, 4), torch.zeros(0), ["a"], "nothing"), device="cpu")


def test_agreement_counts_and_measures_kl_as_scipy_does() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(7, 5)) * 3, rng.normal(size=(7, 5)) * 3

    class Rows(nn.Module):
        def __init__(self, logits: np.ndarray) -> None:
            super().__init__()
            self.logits = torch.from_numpy(logits)

        def forward(self, images: Tensor) -> Tensor:
            return self.logits[images[:, 0, 0, 0].long()]

    index = torch.arange(7.0).view(7, 1, 1, 1)
    found = agreement(Rows(ours), Rows(theirs), index.split(3))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (theirs, ours))
    hits = int((ours.argmax(1) == theirs.argmax(1)).sum())
    assert found["n"] == 7
    assert found["percent"] == pytest.approx(100 * hits / 7)
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-5)
    assert found["interval"] == pytest.approx(wilson(hits, 7))


def test_agreement_of_a_model_with_itself_is_whole_and_a_function_can_be_the_teacher() -> None:
    model = FirstPixel(3).train()
    batches = [torch.rand(4, 1, 4, 4) for _ in range(2)]
    found = agreement(model, lambda images: model(images) * 1, batches)
    assert (found["percent"], found["kl"], found["n"]) == (100, 0, 8)
    assert model.training
    assert agreement(model, FirstPixel(3, offset=1), batches)["percent"] == 0
    with pytest.raises(UserError, match="no synthetic image"):
        agreement(model, model, [])
    with pytest.raises(UserError, match="3 logits, its teacher 4"):
        agreement(model, FirstPixel(4), batches)


def sample(shares: list[float], n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=rng)
    images = (torch.rand(n, 2, 3, 3, generator=rng) + labels.view(-1, 1, 1, 1)) / len(shares)
    features = torch.randn(n, 5, generator=rng) * (1 + labels[:, None]) + 7
    return images, features, labels


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.7, 0.1, 0.0, 0.2]])
def test_diversity_splits_the_total_variance(shares: list[float]) -> None:
    images, features, labels = sample(shares)
    found = diversity(images, features, labels, classes=4)
    for name, points in (("pixel", images.flatten(1)), ("feature", features)):
        total = points.double().numpy().var(axis=0).mean()  # law of total variance
        assert found[f"{name}_within"] + found[f"{name}_between"] == pytest.approx(total, rel=1e-5)
        parts = [points[labels == k].double().numpy() for k in range(4) if shares[k]]
        within = sum(len(part) * part.var(axis=0).mean() for part in parts) / len(labels)
        assert found[f"{name}_within"].item() == pytest.approx(within, rel=1e-5)
        ratio = found[f"{name}_within"] / found[f"{name}_between"]
        assert found[f"{name}_ratio"].item() == pytest.approx(ratio.item())
    small = diversity(images / 1000, features / 1000, labels, classes=4)  # a share knows no unit
    assert [small[f"{name}_ratio"].item() for name in ("pixel", "feature")] == pytest.approx(
        [found[f"{name}_ratio"].item() for name in ("pixel", "feature")], rel=1e-3
    )
    assert all(value.shape == () for value in found.values())


def test_diversity_tells_one_image_per_class_and_one_image_at_all() -> None:
    labels = torch.arange(40) % 4
    per_class = labels.view(-1, 1, 1, 1).expand(40, 1, 2, 2) / 4.0
    found = diversity(per_class, per_class.flatten(1), labels, classes=4)
    assert found["pixel_within"] == 0
    assert found["pixel_ratio"] == 0
    assert found["pixel_between"] == pytest.approx(np.var([0, 0.25, 0.5, 0.75]))
    same = diversity(torch.ones(8, 1, 2, 2), torch.ones(8, 3), torch.zeros(8).long(), classes=4)
    assert all(math.isfinite(value) for value in same.values())


def test_diversity_keeps_float32_under_autocast_and_half_precision_inputs() -> None:
    images, features, labels = sample([0.25] * 4)
    exact = diversity(images, features, labels, classes=4)
    with torch.autocast("cpu", torch.bfloat16):
        under = diversity(images, features, labels, classes=4)
    assert all(torch.equal(exact[name], under[name]) for name in exact)
    half = diversity(images.bfloat16(), features.bfloat16(), labels, classes=4)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert half["feature_ratio"] == pytest.approx(exact["feature_ratio"].item(), rel=0.02)


def test_agreement_is_measured_in_the_given_precision() -> None:
    seen = []
    model, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2))
    for each in (model, teacher):
        each.register_forward_hook(lambda module, given, logits: seen.append(logits.dtype))
    for precision, dtype in ((None, torch.float32), (partial(torch.autocast, "cpu", torch.bfloat16), torch.bfloat16)):
        seen.clear()
        agreement(model, teacher, [torch.rand(4, 1, 4, 4)], **({"autocast": precision} if precision else {}))
        assert seen == [dtype] * 2
