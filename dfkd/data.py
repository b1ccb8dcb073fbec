"""Real images: the only room that opens them, and it writes down every time it does."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dfkd.errors import UserError, in_a_line
from dfkd.runtime import cores

PURPOSES = {  # nothing else may look at a real image; and what to do where there is none
    "train teacher": "give the teacher weights",
    "evaluate": "leave evaluation out",
    "control": "use noise as control",
    "quality": "leave it out",
}
DOWNLOADS = {
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
DATASETS = ("digits", *DOWNLOADS, "imagefolder", "none")

_ledger: list[dict[str, Any]] = []


@dataclass(frozen=True)
class RealImages:
    """Labelled real images in memory: images uint8 [N, C, H, W] on the CPU, labels int64 [N] in [0, K)."""

    images: Tensor
    labels: Tensor
    class_names: list[str]  # K names, in the order of the labels
    source: str

    def __len__(self) -> int:
        return len(self.labels)


def opened() -> list[dict[str, Any]]:
    """What this process opened, in order: {source, split, purpose, n} each; `data_free` of results.json."""
    return [dict(entry) for entry in _ledger]


def load_images(
    dataset: str,
    *,
    train: bool,
    root: str,
    train_root: str | None,
    channels: int,
    size: int,
    classes: int,
    purpose: str,
) -> RealImages:
    """Open the training or test images of a data set, uint8 [N, channels, size, size], and record it.

    `purpose` is one of PURPOSES. `root` is where downloads go, or imagefolder's test images; `train_root` its
    training images. A data set that is not there is downloaded: with several processes, let one come first.
    Raises UserError where the images cannot be had, or have another number of classes than `classes`.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"real images opened for {purpose!r}; allowed: {', '.join(PURPOSES)}")
    if dataset not in DATASETS:
        raise UserError(f"data.dataset={dataset!r} is unknown; choose from {', '.join(DATASETS)}")
    if dataset == "none":
        raise UserError(
            f"data.dataset=none: no real images for {purpose!r}; {PURPOSES[purpose]}, or choose from "
            f"{', '.join(DATASETS[:-1])}"
        )
    _check_channels(channels)
    if dataset == "imagefolder":
        data = _folder_images(image_folder(train, root, train_root), channels, size, classes)
    else:
        images, labels, names = _digits(train) if dataset == "digits" else _download(dataset, train, root)
        _check_classes(dataset, names, classes)
        # In parts, because floats are four times the size.
        fitted = torch.cat([_fitted(part, channels, size) for part in images.split(4096)])
        data = RealImages(fitted, labels, names, dataset)
    _ledger.append(entry(data, train=train, purpose=purpose))
    return data


def entry(images: RealImages, *, train: bool, purpose: str) -> dict[str, Any]:
    """What is told of images that were opened."""
    split = "train" if train else "test"
    return {"source": images.source, "split": split, "purpose": purpose, "n": len(images)}


def sample(images: RealImages, count: int) -> RealImages:
    """At most `count` of the images, spread evenly."""
    rows = evenly(len(images), count)
    return replace(images, images=images.images[rows], labels=images.labels[rows])


def evenly(of: int, count: int) -> Tensor:
    """At most `count` of the row numbers below `of`, spread evenly."""
    n = min(count, of)
    return torch.arange(n) * of // max(1, n)


def load_folder(
    folder: str | Path, *, channels: int, size: int, classes: int, limit: int
) -> tuple[Tensor, Tensor | None]:
    """At most `limit` images of a folder, evenly out of all, uint8 [N, channels, size, size], with labels int64 [N].

    It holds a folder of images per class (stream.materialize writes such), or images alone: then labels are None.
    The images may be synthetic or real: they are recorded as opened for `quality`. Raises UserError where there is no
    image, one cannot be read, or the class folders do not fit `classes`.
    """
    _check_channels(channels)
    paths, labels = _listed(Path(folder), classes)
    chosen = evenly(len(paths), limit)
    if not len(chosen):
        raise UserError(f"{folder} holds no image; give a folder of images, or of a folder of images per class")
    images = _all_decoded([str(paths[row]) for row in chosen.tolist()], channels, size)
    _ledger.append({"source": f"folder {folder}", "split": "all", "purpose": "quality", "n": len(chosen)})
    return images, None if labels is None else labels[chosen]


def _listed(folder: Path, classes: int) -> tuple[list[Path], Tensor | None]:
    """The image files of a folder in the order of their names, and their labels [N] where they lie in class folders."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        below = {entry: sorted(filter(_is_image, entry.rglob("*"))) for entry in entries if entry.is_dir()}
    except OSError as error:
        raise UserError(f"{folder} cannot be read as a folder: {error}") from error
    flat = [entry for entry in entries if _is_image(entry)]
    if not any(below.values()):
        return flat, None
    if flat:
        raise UserError(f"{folder} holds images ({flat[0].name}, ...) beside folders of images; give either")
    labels = dict(zip(below, _folder_labels(folder, [entry.name for entry in below], classes)))
    found = [(path, labels[entry]) for entry, paths in below.items() for path in paths]
    return [path for path, _ in found], torch.tensor([label for _, label in found])


def _is_image(path: Path) -> bool:
    return torchvision.datasets.folder.is_image_file(path.name) and path.is_file()


def _folder_labels(folder: Path, names: list[str], classes: int) -> list[int]:
    """The classes of sorted folder names: their positions where there is one for each class (torchvision's rule), else
    the numbers they are, as a generator without some class leaves them."""
    if len(names) == classes:
        return list(range(classes))
    if len(names) < classes and all(name.isdecimal() and int(name) < classes for name in names):
        return [int(name) for name in names]
    raise UserError(
        f"{folder} has {len(names)} class folders ({', '.join(names[:5])}) but classes={classes}; give one for each "
        f"class, or name them by their classes' numbers, {0:05d} to {classes - 1:05d}"
    )


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise UserError(f"image.channels={channels}: real images are grey (1) or RGB (3)")


def _check_classes(source: str, names: list[str], classes: int) -> None:
    if len(names) != classes:
        raise UserError(f"{source} has {len(names)} classes but classes={classes}; set classes={len(names)}")


def _digits(train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Handwritten digits that scikit-learn carries: 1797 grey 8x8 images, 70 % of each class for training."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("data.dataset=digits needs scikit-learn: pip install 'dfkd[demo]'") from error
    images, labels = load_digits(return_X_y=True)  # float64 [1797, 64] in 0..16
    # The split is part of the data set: no seed may test on another seed's training images.
    halves = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    chosen = np.sort(halves[0 if train else 1])
    pixels = torch.from_numpy(images[chosen] * (255 / 16)).round().to(torch.uint8)
    return (
        pixels.view(-1, 1, 8, 8),
        torch.from_numpy(labels[chosen]).long(),
        [str(digit) for digit in range(10)],
    )


def _download(dataset: str, train: bool, root: str) -> tuple[Tensor, Tensor, list[str]]:
    """A torchvision data set, downloaded into `root` if need be: uint8 [N, C, H, W], labels, names."""
    builder = getattr(torchvision.datasets, DOWNLOADS[dataset])
    which: dict[str, Any] = {"split": "train" if train else "test"} if dataset == "svhn" else {"train": train}
    try:
        found = builder(root, download=True, **which)
    except ImportError as error:  # SVHN is a MATLAB file
        raise UserError(f"data.dataset={dataset} needs scipy: pip install 'dfkd[demo]'") from error
    except (OSError, RuntimeError, EOFError) as error:  # no network, a full disk, a torn archive
        cause = in_a_line(error)
        raise UserError(
            f"{dataset} could not be had in data.root={root} ({cause}); put it there, or use your own copy: "
            "data.dataset=imagefolder data.root=TEST_FOLDER data.train_root=TRAIN_FOLDER"
        ) from error
    pixels = torch.from_numpy(np.ascontiguousarray(found.data))
    if dataset.startswith("cifar"):
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    elif pixels.dim() == 3:
        pixels = pixels.unsqueeze(1)
    labels = torch.as_tensor(np.asarray(found.labels if dataset == "svhn" else found.targets)).long()
    return pixels, labels, list(getattr(found, "classes", map(str, range(10))))


def _fitted(images: Tensor, channels: int, size: int) -> Tensor:
    """uint8 [N, 1 or 3, H, W] as uint8 [N, channels, size, size]: grey is ITU-R 601 luma."""
    if images.shape[1:] == (channels, size, size):
        return images
    pixels = images.float()
    if images.shape[1] > channels:  # torchvision's own grey truncates, and makes white 254
        pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if images.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8).expand(-1, channels, -1, -1)


def image_folder(train: bool, root: str, train_root: str | None) -> Path:
    """Where this split's images lie; raises UserError if nowhere, or if the two folders' classes differ."""
    root, train_root = os.path.expanduser(root), os.path.expanduser(train_root) if train_root else None
    name, chosen = ("data.train_root", train_root) if train else ("data.root", root)
    if not chosen or not Path(chosen).is_dir():
        split = "training" if train else "test"
        raise UserError(f"{name}={chosen or 'null'} is no folder; imagefolder: {split} images, one folder per class")
    if train_root and Path(train_root).is_dir() and Path(root).is_dir():
        # Labels are positions in the sorted names: one folder more or less would silently shift them all.
        odd = _class_folders(root) ^ _class_folders(train_root)
        if odd:
            shown = ", ".join(sorted(odd)[:5])
            raise UserError(f"data.root={root} and data.train_root={train_root} differ in classes: {shown}")
    return Path(chosen)


def _class_folders(root: str) -> set[str]:
    return {entry.name for entry in Path(root).iterdir() if entry.is_dir() and not entry.name.startswith(".")}


class _Folder(torchvision.datasets.ImageFolder):
    """An image folder in which what programs hide beside the classes (.ipynb_checkpoints) is none."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(_class_folders(directory))
        if not names:
            raise FileNotFoundError(f"no folder in {directory}")
        return names, {name: k for k, name in enumerate(names)}


def check_folder(train: bool, root: str, train_root: str | None, classes: int) -> None:
    """Raise UserError where this split's images do not lie in one folder for each class; none of them is opened."""
    _listing(image_folder(train, root, train_root), classes)


def _listing(folder: Path, classes: int) -> _Folder:
    try:
        listing = _Folder(str(folder))
    except OSError as error:
        reason = in_a_line(error)
        raise UserError(f"{folder} is not an image folder with one folder per class: {reason}") from error
    _check_classes(str(folder), listing.classes, classes)
    return listing


def _folder_images(folder: Path, channels: int, size: int, classes: int) -> RealImages:
    """Images in one folder per class, labels in the order of the sorted names, all decoded into memory."""
    listing = _listing(folder, classes)
    images = _all_decoded([path for path, _ in listing.samples], channels, size)
    return RealImages(images, torch.tensor(listing.targets), listing.classes, f"imagefolder {folder}")


def _all_decoded(paths: list[str], channels: int, size: int) -> Tensor:
    """Image files as uint8 [N, channels, size, size]."""
    shape = (len(paths), size, size) if channels == 1 else (len(paths), size, size, 3)
    pixels = np.empty(shape, np.uint8)

    def decode(start: int) -> None:
        for index in range(start, min(start + 64, len(pixels))):
            pixels[index] = _decoded(paths[index], channels, size)

    with ThreadPoolExecutor(min(16, cores())) as pool:  # Pillow decodes outside Python's lock
        list(pool.map(decode, range(0, len(pixels), 64)))  # list: raises here what decode raised
    return torch.from_numpy(pixels).view(len(pixels), size, size, channels).permute(0, 3, 1, 2).contiguous()


def _decoded(path: str, channels: int, size: int) -> np.ndarray:
    """One file's largest centred square as uint8 [size, size] (grey) or [size, size, 3] (RGB)."""
    try:
        with Image.open(path) as opened_file:
            if opened_file.mode[0] in "IF":  # Pillow would clip these to white without a word
                raise UserError(f"{path} has more than 8 bits per channel; save it as 8-bit grey or RGB")
            image: Image.Image = opened_file.convert("L" if channels == 1 else "RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(image)
