import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from dfkd import data
from dfkd.data import RealImages, load_images
from dfkd.errors import UserError

DIGITS = {"root": "unused", "train_root": None, "channels": 1, "size": 8, "classes": 10}


def load(dataset: str = "digits", train: bool = False, **changes: object) -> RealImages:
    purpose = "train teacher" if train else "evaluate"
    return load_images(dataset, train=train, **{**DIGITS, "purpose": purpose, **changes})  # type: ignore[arg-type]


def error(dataset: str, train: bool = False, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        load(dataset, train, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def save_folder(root: Path, pixels: dict[str, np.ndarray]) -> str:
    for name, array in pixels.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return str(root)


def test_digits_are_scikit_learns_split_70_to_30_by_class() -> None:
    train, test = load(train=True), load()
    pixels, labels = load_digits(return_X_y=True)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert train.images.shape == (1257, 1, 8, 8)
    assert len(test) == 540
    shares = test.labels.bincount() / torch.from_numpy(labels).bincount()
    assert (shares - 0.3).abs().max() < 0.01
    whole = np.sort(np.concatenate([train.images, test.images]).reshape(1797, 64).astype(float) * 16 / 255, axis=None)
    assert np.abs(whole - np.sort(pixels, axis=None)).max() < 0.04  # half a level of uint8
    assert not rows(train.images) & rows(test.images)


def test_digits_carry_their_own_labels_and_the_split_never_moves() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first, again = load(), load()
    assert torch.equal(first.images, again.images)
    pixels, labels = load_digits(return_X_y=True)
    truth = {tuple(np.round(row * 255 / 16).astype(int)): label for row, label in zip(pixels, labels)}
    assert [truth[tuple(row)] for row in first.images.flatten(1).tolist()] == first.labels.tolist()


def test_digits_grow_to_size_and_channels() -> None:
    small, large = load(), load(size=16, channels=3)
    assert large.images.shape == (540, 3, 16, 16)
    assert torch.equal(large.images[:, 0], large.images[:, 2])
    # Doubling by bilinear interpolation puts 9/16, 3/16, 3/16, 1/16 of four neighbours into an inner pixel.
    near = small.images[:, 0].double()
    expected = (9 * near[:, 3, 3] + 3 * near[:, 3, 4] + 3 * near[:, 4, 3] + near[:, 4, 4]) / 16
    assert (large.images[:, 0, 7, 7] - expected).abs().max() <= 0.5 + 1e-3


def test_ledger_records_what_was_opened_and_nothing_that_failed() -> None:
    before = len(data.opened())
    load(train=True)
    load()
    error("digits", classes=7)
    assert data.opened()[before:] == [
        {"source": "digits", "split": "train", "purpose": "train teacher", "n": 1257},
        {"source": "digits", "split": "test", "purpose": "evaluate", "n": 540},
    ]
    data.opened().clear()
    data.opened()[0]["n"] = 0
    assert len(data.opened()) == before + 2
    assert data.opened()[0]["n"]
    with pytest.raises(ValueError, match="train student"):
        load(purpose="train student")


def test_image_folder_keeps_pixels_and_sorted_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (70, 8, 8, 3), np.uint8)
    names = {f"{'cat' if k % 2 else 'dog'}/{k:03}.png": colour[k] for k in range(70)}
    found = load("imagefolder", root=save_folder(tmp_path, names), channels=3, classes=2)
    assert found.class_names == ["cat", "dog"]
    order = [k for k in range(70) if k % 2] + [k for k in range(70) if not k % 2]
    assert found.labels.tolist() == [0] * 35 + [1] * 35
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), colour[order])
    assert data.opened()[-1] == {
        "source": f"imagefolder {tmp_path}",
        "split": "test",
        "purpose": "evaluate",
        "n": 70,
    }


def test_image_folder_converts_grey_and_rgb(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    root = save_folder(tmp_path, {"a/grey.png": grey, "b/red.png": red})
    as_grey = load("imagefolder", root=root, classes=2).images
    as_rgb = load("imagefolder", root=root, classes=2, channels=3).images
    assert as_grey.shape == (2, 1, 8, 8)
    assert np.array_equal(as_grey[0, 0], grey)
    assert (as_grey[1] - 0.299 * 200).abs().max() <= 1  # ITU-R 601 luma
    assert np.array_equal(as_rgb[0], np.stack([grey] * 3))
    assert as_rgb[1].flatten(1).float().mean(1).tolist() == [200, 0, 0]


def test_image_folder_low_passes_what_it_shrinks_and_keeps_proportions(tmp_path: Path) -> None:
    stripes = np.zeros((32, 64), np.uint8)
    stripes[:, ::2] = 255  # without antialias a shrunken image is black or white, not grey
    stripes[:, :12] = stripes[:, -12:] = 0  # outside the centred square
    root = save_folder(tmp_path, {"a/x.png": stripes, "b/x.png": stripes})
    shrunk = load("imagefolder", root=root, classes=2).images
    assert shrunk.shape == (2, 1, 8, 8)
    assert (shrunk[0].float() - 127.5).abs().max() < 12


def test_image_folder_trains_from_train_root(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    test_root = save_folder(tmp_path / "test", {"a/x.png": pixels, "b/x.png": pixels})
    train_root = save_folder(tmp_path / "train", {f"{c}/{k}.png": pixels + 9 for c in "ab" for k in range(3)})
    found = load("imagefolder", True, root=test_root, train_root=train_root, classes=2)
    assert len(found) == 6
    assert (found.images == 9).all()
    assert data.opened()[-1]["split"] == "train"


def test_image_folder_errors_are_one_line_with_a_remedy(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    root = save_folder(tmp_path / "test", {"a/x.png": pixels, "b/x.png": pixels})
    assert "data.train_root=null is no folder" in error("imagefolder", True, root=root, classes=2)
    assert "data.root=nowhere is no folder" in error("imagefolder", root="nowhere", classes=2)
    assert "has 2 classes but classes=10; set classes=2" in error("imagefolder", root=root)
    other = save_folder(tmp_path / "train", {"a/x.png": pixels, "c/x.png": pixels})
    message = error("imagefolder", True, root=root, train_root=other, classes=2)
    assert "differ in classes: b, c" in message
    save_folder(tmp_path / "test", {".ipynb_checkpoints/x.png": pixels})
    assert load("imagefolder", root=root, classes=2).class_names == ["a", "b"]
    (tmp_path / "empty").mkdir()
    assert "not an image folder" in error("imagefolder", root=str(tmp_path / "empty"), classes=2)
    save_folder(tmp_path / "test", {"a/deep.png": np.full((8, 8), 40000, np.uint16)})
    assert "a/deep.png has more than 8 bits" in error("imagefolder", root=root, classes=2)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "test" / "a" / "deep.png", "TIFF")
    assert "a/deep.png has more than 8 bits" in error("imagefolder", root=root, classes=2)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "test" / "a" / "deep.png")
    assert "a/deep.png cannot be read as an image: Image size (200000000 pixels)" in error(
        "imagefolder", root=root, classes=2
    )
    (tmp_path / "test" / "a" / "deep.png").write_bytes(b"no image")
    assert "a/deep.png cannot be read as an image" in error("imagefolder", root=root, classes=2)


def test_image_folders_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    for split in ("test", "train"):
        save_folder(tmp_path / split, {"a/x.png": pixels, "b/x.png": pixels})
    monkeypatch.setenv("HOME", str(tmp_path))
    for train in (True, False):
        assert len(load("imagefolder", train, root="~/test", train_root="~/train", classes=2)) == 2


def write_mnist(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """The files of the MNIST page in the format it documents (idx: magic number, sizes, bytes)."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + labels.tobytes())
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (folder / f"{split}-{name}.gz").write_bytes(gzip.compress(b""))


def test_torchvision_data_sets_come_out_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    grey, labels = rng.integers(0, 256, (20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10
    write_mnist(tmp_path, grey, labels)
    mnist = load("mnist", root=str(tmp_path), size=28)
    assert np.array_equal(mnist.images[:, 0], grey)
    assert np.array_equal(mnist.labels, labels)
    assert mnist.class_names[3] == "3 - three"
    assert load("mnist", root=str(tmp_path), size=32, channels=3).images.shape == (20, 3, 32, 32)

    colour = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
    asked = []

    class Cifar10:
        data, targets, classes = colour, labels.tolist(), [f"class {k}" for k in range(10)]

        def __init__(self, root: str, train: bool, download: bool) -> None:
            asked.append((root, train, download))

    class Svhn:
        def __init__(self, root: str, split: str, download: bool) -> None:
            asked.append((root, split, download))
            self.data, self.labels = colour.transpose(0, 3, 1, 2), labels.astype(np.int64)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar10)
    monkeypatch.setattr("torchvision.datasets.SVHN", Svhn)
    for dataset in ("cifar10", "svhn"):
        found = load(dataset, True, root="somewhere", size=32, channels=3)
        assert np.array_equal(found.images.permute(0, 2, 3, 1), colour)
        assert np.array_equal(found.labels, labels)
        assert len(found.class_names) == 10
    assert asked == [("somewhere", True, True), ("somewhere", "train", True)]
    luma = colour.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(load("cifar10", size=32).images[:, 0].numpy() - luma).max() <= 0.5 + 1e-4


class Split:
    """What torchvision gives of a split: white images of the training split, dark ones of the test split."""

    def __init__(self, root: str, download: bool, train: bool | None = None, split: str = "") -> None:
        pixels = np.full(self.shape, 200 if train or split == "train" else 30, np.uint8)
        self.data = torch.from_numpy(pixels) if len(self.shape) == 3 else pixels
        self.targets = self.labels = np.arange(5)


SPLITS = {
    "mnist": ("MNIST", (5, 28, 28), 10),
    "fashionmnist": ("FashionMNIST", (5, 28, 28), 10),
    "svhn": ("SVHN", (5, 3, 32, 32), 10),
    "cifar10": ("CIFAR10", (5, 32, 32, 3), 10),
    "cifar100": ("CIFAR100", (5, 32, 32, 3), 100),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dataset", SPLITS)
def test_a_split_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, dataset: str, train: bool) -> None:
    name, shape, classes = SPLITS[dataset]
    kind = type(name, (Split,), {"shape": shape, "classes": [str(k) for k in range(classes)]})
    monkeypatch.setattr(f"torchvision.datasets.{name}", kind)
    assert load(dataset, train, size=28, classes=classes).images.unique().tolist() == [200 if train else 30]


def test_a_downloaded_image_is_made_smaller_as_pillow_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    kind = type("Random", (Split,), {"shape": pixels.shape, "data": pixels, "classes": list("0123456789")})
    monkeypatch.setattr(kind, "__init__", lambda self, root, download, train: setattr(self, "targets", np.arange(4)))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", kind)
    found = load("cifar10", size=16, channels=3).images.permute(0, 2, 3, 1).int()
    exact = np.stack([Image.fromarray(each).resize((16, 16), Image.Resampling.BILINEAR) for each in pixels])
    assert (found - torch.from_numpy(exact).int()).abs().max() <= 1


@pytest.mark.parametrize("dataset", ["mnist", "fashionmnist", "svhn", "cifar10", "cifar100"])
def test_failed_download_names_root_and_the_alternative(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = str(tmp_path / "file" / "data")  # nothing can be written there: fails before the network is asked
    message = error(dataset, root=root, classes=100 if dataset == "cifar100" else 10)
    assert f"data.root={root}" in message
    assert "data.dataset=imagefolder data.root=" in message
    assert "data.train_root=" in message


def test_other_errors_name_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no real images for 'evaluate'" in error("none")
    assert "choose from digits, mnist" in error("none")
    assert "give the teacher weights" in error("none", True)
    assert "cifar10, cifar100, imagefolder" in error("cifar")
    assert "image.channels=2" in error("digits", channels=2)
    assert "digits has 10 classes but classes=12; set classes=10" in error("digits", classes=12)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install 'dfkd[demo]'" in error("digits")
