"""Generators: images in [0, 1] of any size that depend on latents and labels, and their files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from generators import GENERATORS, ConvGenerator, GeneratorError, build_generator, load_generator, save_generator
from generators.conv import PixelHead

DESCRIPTION = {
    "arch": "conv",
    "latent": 6,
    "classes": 3,
    "channels": 2,
    "size": 9,
    "width": 4,
    "conditional": True,
    "mean": [0.2, 0.6],
    "std": [0.1, 0.3],
}


def latents_and_labels(count: int, latent: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, latent, generator=rng), torch.randint(classes, (count,), generator=rng)


def saved(folder: Path) -> ConvGenerator:
    """A generator with statistics of its own in a folder."""
    torch.manual_seed(3)
    generator = build_generator(DESCRIPTION)
    for seed in range(3):
        generator(torch.randn(16, 6), torch.randint(3, (16,)))  # moves the running statistics
        torch.manual_seed(seed)
    save_generator(folder, generator, DESCRIPTION | {"trained_on": ["plain"]})
    return generator


@pytest.mark.parametrize("arch", sorted(GENERATORS))
@pytest.mark.parametrize("size", [4, 8, 15, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_exact_size_and_stay_in_range(arch: str, size: int, channels: int) -> None:
    generator = build_generator(DESCRIPTION | {"arch": arch, "size": size, "channels": channels, "mean": [], "std": []})
    latents, labels = latents_and_labels(8)
    for mode in (True, False):
        images = generator.train(mode)(100 * latents, labels)
        assert images.shape == (8, channels, size, size)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.std() > 0


def test_pixels_start_with_the_given_mean_and_spread() -> None:
    torch.manual_seed(0)
    wanted = {"channels": 2, "mean": [0.3, 0.6], "std": [0.02, 0.05]}  # far from 0 and 1: nothing is clamped
    generator = build_generator(DESCRIPTION | wanted)
    images = generator(*latents_and_labels(64)).detach().double()
    assert images.mean((0, 2, 3)).tolist() == pytest.approx(wanted["mean"], abs=1e-5)
    assert images.std((0, 2, 3), unbiased=False).tolist() == pytest.approx(wanted["std"], rel=1e-3)


def test_latents_and_labels_both_matter(make_generator: Callable[..., ConvGenerator]) -> None:
    latents, labels = latents_and_labels(16)
    labels[:2] = 1
    generator = make_generator().eval()
    images = generator(latents, labels)
    assert (images[0] - images[1]).abs().mean() > 0.1 * images.std()  # one class, two latents
    relabelled = generator(latents, (labels + 1) % 3)
    assert ((images - relabelled).abs().flatten(1).mean(1) > 0.1 * images.std()).all()


def test_an_unconditional_generator_takes_no_notice_of_labels(make_generator: Callable[..., ConvGenerator]) -> None:
    latents, labels = latents_and_labels(16)
    generator = make_generator(conditional=False).eval()
    assert torch.equal(generator(latents, labels), generator(latents, (labels + 1) % 3))


def test_a_saturated_pixel_keeps_its_gradient() -> None:
    head = PixelHead(1, mean=[0.5], std=[0.25]).eval()  # eval mode: running mean 0 and variance 1
    x = torch.tensor([[-9.0, 0.5, 9.0]]).view(1, 1, 1, 3).requires_grad_()
    images = head(x)
    images.sum().backward()
    assert images.flatten().tolist() == pytest.approx([0, 0.625, 1], abs=1e-5)
    assert x.grad is not None
    assert x.grad.flatten().tolist() == pytest.approx([0.25] * 3, rel=1e-4)


@pytest.mark.parametrize(("conditional", "names"), [(True, "embed project project_norm"), (False, "project")])
def test_first_layers_read_latents_and_labels(
    make_generator: Callable[..., ConvGenerator], conditional: bool, names: str
) -> None:
    generator = make_generator(conditional=conditional)
    first = {id(parameter) for module in generator.first_layers() for parameter in module.parameters()}
    own = {name.split(".")[0] for name, parameter in generator.named_parameters() if id(parameter) in first}
    assert own == set(names.split()) | {"project_norm"}
    before = generator.project.weight.detach().clone()
    for module in generator.first_layers():
        module.reset_parameters()  # type: ignore[operator]
    assert not torch.equal(before, generator.project.weight)


def test_every_weight_gets_a_gradient(make_generator: Callable[..., ConvGenerator]) -> None:
    generator = make_generator()
    (generator(*latents_and_labels(32)) * torch.rand(32, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in generator.parameters())


def test_a_folder_alone_rebuilds_the_generator(tmp_path: Path) -> None:
    generator = saved(tmp_path / "run" / "generator")
    shutil.move(tmp_path / "run" / "generator", tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["generator.json", "model.safetensors"]
    loaded = load_generator(tmp_path / "elsewhere")
    latents, labels = latents_and_labels(8)
    with torch.no_grad():
        assert torch.equal(loaded(latents, labels), generator.eval()(latents, labels))
    assert loaded.description == DESCRIPTION | {"trained_on": ["plain"]}
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_again_replaces_the_old_generator(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.manual_seed(9)
    save_generator(tmp_path, build_generator(DESCRIPTION | {"width": 2}), DESCRIPTION | {"width": 2})
    assert load_generator(tmp_path).to_pixels.in_channels == 2


def describe(folder: Path, **changes: object) -> None:
    (folder / "generator.json").write_text(json.dumps(DESCRIPTION | changes))


def without(folder: Path, key: str) -> None:
    (folder / "generator.json").write_text(json.dumps({k: v for k, v in DESCRIPTION.items() if k != key}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no description": (lambda f: (f / "generator.json").unlink(), "generator.json is missing"),
    "no folder": (shutil.rmtree, "generator.json is missing"),
    "torn weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x09torn"), "torn"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "torn"),
    "torn description": (lambda f: (f / "generator.json").write_text('{"arch": "co'), "torn"),
    "binary description": (lambda f: (f / "generator.json").write_bytes(b"\xff\xfe\x00"), "torn"),
    "description is a list": (lambda f: (f / "generator.json").write_text("[1]"), "generator.json"),
    "unknown architecture": (lambda f: describe(f, arch="gan"), "unknown generator 'gan'; choose from ['conv'"),
    "incomplete description": (lambda f: without(f, "latent"), "lacks ['latent']"),
    "other width": (lambda f: describe(f, width=8), "do not fit its generator.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "generator"
    saved(folder)
    breakage, reason = BROKEN[case]
    breakage(folder)
    with pytest.raises(GeneratorError) as caught:
        load_generator(folder)
    line = str(caught.value)
    assert reason in line
    assert "\n" not in line


def test_a_file_in_place_of_a_folder_is_named_in_one_line(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(GeneratorError, match=r"model\.safetensors"):
        load_generator(tmp_path / "model.safetensors")
