"""Generators: images in [0, 1] of any size that depend on latents and labels, and their files."""

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from generators import (
    GENERATORS,
    ConvGenerator,
    GeneratorError,
    ImageGenerator,
    PixelGenerator,
    PoolGenerator,
    build_generator,
    load_generator,
    save_generator,
)
from generators.conv import ClassNorm, PixelHead

DESCRIPTION = {
    "arch": "conv",
    "latent": 6,
    "classes": 3,
    "channels": 2,
    "size": 9,
    "width": 4,
    "conditional": True,
    "prototypes": 2,
    "norms": "class",
    "mean": [0.2, 0.6],
    "std": [0.1, 0.3],
}
SIZES = {"classes": 3, "channels": 2, "size": 9}
# What builds each generator of the table: a new one needs a line here.
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "conv": DESCRIPTION,
    "pixels": {"arch": "pixels", **SIZES, "mean": [0.2, 0.6], "std": [0.1, 0.3]},
    "pool": {"arch": "pool", **SIZES, "capacity": 12, "conditional": True},
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


def build(arch: str, **changes: Any) -> ImageGenerator:
    """A generator of the table that has images to draw."""
    torch.manual_seed(3)
    generator = build_generator(DESCRIPTIONS[arch] | changes)
    if isinstance(generator, PoolGenerator):
        about = DESCRIPTIONS[arch] | changes
        generator.push(torch.rand(8, about["channels"], about["size"], about["size"]), torch.arange(8) % 3)
    return generator


@pytest.mark.parametrize("arch", sorted(GENERATORS))
@pytest.mark.parametrize("size", [4, 8, 15, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_exact_size_and_stay_in_range(arch: str, size: int, channels: int) -> None:
    unspecified = {key: [] for key in ("mean", "std") if key in DESCRIPTIONS[arch]}
    generator = build(arch, size=size, channels=channels, **unspecified)
    latents, labels = latents_and_labels(8, generator.latent)
    for mode in (True, False):
        images = generator.train(mode)(100 * latents, labels)
        assert images.shape == (8, channels, size, size)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.std() > 0


@pytest.mark.parametrize("arch", sorted(GENERATORS))
def test_every_generator_comes_back_from_its_folder(tmp_path: Path, arch: str) -> None:
    generator, about = build(arch), DESCRIPTIONS[arch] | {"made_by": "somebody"}
    assert set(GENERATORS[arch].keys) == set(DESCRIPTIONS[arch]) - {"arch"}
    save_generator(tmp_path, generator, about)
    loaded = load_generator(tmp_path)
    assert type(loaded) is GENERATORS[arch]
    assert loaded.description == about
    assert (loaded.latent, loaded.classes, loaded.device) == (generator.latent, 3, torch.device("cpu"))
    assert not any(module.training for module in loaded.modules())
    inputs = latents_and_labels(16, generator.latent)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), generator.eval()(*inputs))
        assert not torch.equal(loaded(*inputs), loaded(-inputs[0], inputs[1]))
    for key in set(GENERATORS[arch].keys) - set(GENERATORS[arch].older):
        (tmp_path / "generator.json").write_text(json.dumps({k: v for k, v in about.items() if k != key}))
        with pytest.raises(GeneratorError, match=rf"lacks \['{key}'\]; it must give .* must be trained again"):
            load_generator(tmp_path)


@pytest.mark.parametrize("arch", sorted(GENERATORS))
def test_a_new_generator_needs_no_more_than_its_sizes_and_says_itself_what_built_it(tmp_path: Path, arch: str) -> None:
    needed = {"arch": arch, **SIZES} | {"conv": {"latent": 6}, "pixels": {}, "pool": {"capacity": 4}}[arch]
    generator = build_generator(needed)
    save_generator(tmp_path, generator)
    loaded = load_generator(tmp_path)
    assert needed.items() <= loaded.description.items()
    assert loaded.description.keys() == DESCRIPTIONS[arch].keys()
    inputs = latents_and_labels(4, generator.latent)
    assert torch.equal(loaded(*inputs), generator.eval()(*inputs))
    for key in needed.keys() - {"arch"}:
        with pytest.raises(GeneratorError, match=rf"lacks \['{key}'\]; it must give"):
            build_generator({k: v for k, v in needed.items() if k != key})
    with pytest.raises(GeneratorError, match=rf"generator {arch} has no 'widht'; it takes \['"):
        build_generator({**needed, "widht": 8})


def test_a_generator_that_nobody_described_is_not_saved(tmp_path: Path) -> None:
    generator = ConvGenerator(latent=6, **SIZES)
    with pytest.raises(GeneratorError, match="give the description that builds it"):
        save_generator(tmp_path / "made", generator)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("size", (16, 24)), ("size", 0), ("width", "8"), ("classes", 0), ("latent", 2.5)]
)
def test_what_is_counted_is_a_whole_number_from_1(key: str, value: object) -> None:
    with pytest.raises(GeneratorError, match=f"generator conv: {key}=.* is not allowed; give a whole number from 1"):
        build_generator({**DESCRIPTION, key: value})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_generator_that_holds_no_numbers_is_not_saved(tmp_path: Path, value: float) -> None:
    generator = build_generator(DESCRIPTION)
    torch.nn.init.constant_(generator.project.weight, value)
    with pytest.raises(GeneratorError, match=r"project\.weight of the generator holds NaN or infinity; train it"):
        save_generator(tmp_path / "made", generator)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("arch", ["conv", "pixels"])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_mean_of_other_channels_is_refused(arch: str, key: str) -> None:
    with pytest.raises(GeneratorError, match=r"one value a channel, of 2; got \[0.5, 0.5, 0.5\]"):
        build_generator(DESCRIPTIONS[arch] | {key: [0.5] * 3})


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


def test_the_norm_of_a_class_is_torchs_with_scale_and_shift_of_its_own() -> None:
    norm = ClassNorm(2, classes=3)
    x, labels = torch.randn(5, 2, 4, 4), torch.tensor([0, 2, 2, 1, 0])
    plain = F.batch_norm(x, None, None, training=True)
    scale, shift = norm.affine.detach().chunk(2, dim=1)
    expected = torch.stack(
        [
            torch.stack([plain[k, c] * (1 + scale[label, c]) + shift[label, c] for c in range(2)])
            for k, label in enumerate(labels.tolist())
        ]
    )
    torch.testing.assert_close(norm(x, labels), expected)


def test_the_first_latent_chooses_one_of_the_codes_of_a_class(make_generator: Callable[..., ConvGenerator]) -> None:
    generator = make_generator(prototypes=4)
    latents, labels = latents_and_labels(4000)
    quarters = np.digitize(latents[:, 0].numpy(), statistics.NormalDist().quantiles(4))
    embed = generator.embed
    assert embed is not None
    for label in range(3):
        for quarter in range(4):
            chosen = torch.from_numpy((labels.numpy() == label) & (quarters == quarter))
            assert 0.06 < chosen.double().mean() < 0.11  # of 12
            embed.weight.grad = None  # rows that are read get one
            (generator(latents[chosen], labels[chosen]) * torch.rand(1, 8, 8)).sum().backward()
            (row,) = embed.weight.grad.abs().sum(1).nonzero().flatten().tolist()  # type: ignore[attr-defined]
            assert row == 4 * label + quarter


@pytest.mark.parametrize(("norms", "row"), [("class", 2), ("code", 4 * 2 + 3)])
def test_a_norm_belongs_to_the_class_or_to_the_code(
    norms: str, row: int, make_generator: Callable[..., ConvGenerator]
) -> None:
    generator = make_generator(prototypes=4, norms=norms)
    latents, _ = latents_and_labels(8)
    latents[:, 0] = 3.0  # the last quarter
    (generator(latents, torch.full((8,), 2)) * torch.rand(1, 8, 8)).sum().backward()
    for stage in generator.stages:
        assert isinstance(norm := stage.norm, ClassNorm)
        assert norm.affine.grad is not None
        assert norm.affine.grad.abs().sum(1).nonzero().flatten().tolist() == [row]


def test_a_generator_from_before_a_key_is_what_it_was(tmp_path: Path) -> None:
    made = saved(tmp_path)
    about = json.loads((tmp_path / "generator.json").read_text())
    del about["norms"]
    (tmp_path / "generator.json").write_text(json.dumps(about))
    latents, labels = latents_and_labels(4)
    assert torch.equal(load_generator(tmp_path)(latents, labels), made.eval()(latents, labels))


def test_unknown_norms_are_refused() -> None:
    with pytest.raises(
        GeneratorError, match=r"norms='image' of a generator is unknown; choose from \('class', 'code'\)"
    ):
        build_generator({**DESCRIPTION, "norms": "image"})


@pytest.mark.parametrize(("weights", "wanted"), [([-1, 1, 1], [-0.25, 0.25, 0.25]), ([1, -1, -1], [0, -0.25, 0])])
def test_a_saturated_pixel_takes_the_gradient_that_leads_back(weights: list[int], wanted: list[float]) -> None:
    head = PixelHead(1, mean=[0.5], std=[0.25]).eval()  # eval mode: running mean 0 and variance 1
    x = torch.tensor([[-9.0, 0.5, 9.0]]).view(1, 1, 1, 3).requires_grad_()
    images = head(x)
    (images.flatten() * torch.tensor(weights)).sum().backward()
    assert images.flatten().tolist() == pytest.approx([0, 0.625, 1], abs=1e-5)
    assert x.grad is not None
    assert x.grad.flatten().tolist() == pytest.approx(wanted, rel=1e-4)


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


# --- pixels ---


def pixels(**options: Any) -> PixelGenerator:
    return PixelGenerator(**{**SIZES, "mean": [0.2, 0.6], "std": [0.1, 0.3], **options})


def test_pixels_are_the_latents_scaled_shifted_and_clamped() -> None:
    generator, (latents, labels) = pixels(), latents_and_labels(5, 2 * 9 * 9)
    assert generator.latent == latents.shape[1]
    images = generator(3 * latents, labels)
    by_hand = 3 * latents.double().numpy().reshape(5, 2, 81)
    wanted = np.clip(by_hand * np.array([[0.1], [0.3]]) + np.array([[0.2], [0.6]]), 0, 1).reshape(5, 2, 9, 9)
    assert (wanted == 0).any()
    assert (wanted == 1).any()
    np.testing.assert_allclose(images.numpy(), wanted, atol=1e-6)
    assert torch.equal(images, generator(3 * latents, (labels + 1) % 3))
    assert generator.first_layers() == []
    assert not list(generator.parameters())


def test_saturated_pixels_keep_the_gradient_that_leads_back() -> None:
    latents = torch.full((1, 162), 50.0, requires_grad=True)
    pixels()(latents, torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert latents.grad is not None
    assert latents.grad.view(2, 81)[:, 0].tolist() == pytest.approx([0.1, 0.3])


def test_projected_latents_are_the_nearest_of_images_in_range() -> None:
    generator, (latents, _) = pixels(), latents_and_labels(6, 162)
    latents *= 5
    raw = latents.view(6, 2, 9, 9) * generator.std + generator.mean
    inside = ((raw > 1e-5) & (raw < 1 - 1e-5)).flatten(1)
    assert 0.1 < inside.float().mean() < 0.9
    projected = latents.clone().requires_grad_()
    generator.project_(projected)  # a leaf that learns, as the synthesizer has it
    assert torch.equal(projected[inside], latents[inside])
    seen = (projected.detach().view(6, 2, 9, 9) * generator.std + generator.mean).double()
    assert -1e-6 < float(seen.min()) <= float(seen.max()) < 1 + 1e-6
    torch.testing.assert_close(seen, raw.clamp(0, 1).double(), atol=1e-6, rtol=0)
    again = projected.detach().clone()
    generator.project_(again)
    assert torch.equal(again, projected.detach())


def test_noise_has_the_statistics_of_a_clamped_normal() -> None:
    latents, labels = latents_and_labels(400, 162)
    images = pixels()(latents, labels).double().transpose(0, 1).flatten(1)
    count = images.shape[1]
    for channel, mean, std in zip(images.numpy(), (0.2, 0.6), (0.1, 0.3)):
        normal = statistics.NormalDist(mean, std)
        low, high = normal.cdf(0), 1 - normal.cdf(1)
        for share, found in ((low, (channel == 0).mean()), (high, (channel == 1).mean())):
            assert found == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5 + 1 / count)
        x = np.linspace(0, 1, 20001)
        density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * (2 * np.pi) ** 0.5)
        expected = high + np.trapezoid(x * density, x)
        assert channel.mean() == pytest.approx(expected, abs=5 * std / count**0.5)
        assert channel.std() == pytest.approx((high + np.trapezoid(x**2 * density, x) - expected**2) ** 0.5, rel=0.02)


# --- files ---


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


def spoil(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["project.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no description": (lambda f: (f / "generator.json").unlink(), "generator.json is missing"),
    "a folder instead": (lambda f: ((f / "generator.json").unlink(), (f / "generator.json").mkdir()), "cannot be read"),
    "no folder": (shutil.rmtree, "generator.json is missing"),
    "torn weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x09torn"), "torn"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "torn"),
    "torn description": (lambda f: (f / "generator.json").write_text('{"arch": "co'), "torn"),
    "binary description": (lambda f: (f / "generator.json").write_bytes(b"\xff\xfe\x00"), "torn"),
    "description is a list": (lambda f: (f / "generator.json").write_text("[1]"), "generator.json"),
    "unknown architecture": (lambda f: describe(f, arch="gan"), "unknown generator 'gan'; choose from ['conv'"),
    "incomplete description": (lambda f: without(f, "latent"), "lacks ['latent']"),
    "NaN": (spoil, "generator holds NaN or infinity; train it again"),
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


def by_hand(generator: ConvGenerator, latents: Tensor, labels: Tensor) -> Tensor:
    """Images of a generator in eval mode from its file's tensors, two stages, norms of the code, float64."""
    w = {name: value.double() for name, value in generator.state_dict().items()}
    quantile = torch.distributions.Normal(0, 1).cdf(latents[:, 0].double())
    codes = labels * generator.prototypes + (quantile * generator.prototypes).long()
    code = w["embed.weight"][codes]
    code = code / code.square().mean(1, keepdim=True).sqrt()  # as large as the latents
    x = (torch.cat([latents.double(), code], 1) @ w["project.weight"].T).view(len(labels), -1, 2, 2)

    def normed(x: Tensor, name: str) -> Tensor:
        mean, var = (w[f"{name}.running_{what}"].view(1, -1, 1, 1) for what in ("mean", "var"))
        return (x - mean) / (var + 1e-5).sqrt()

    x = normed(x, "project_norm") * w["project_norm.weight"].view(1, -1, 1, 1) + w["project_norm.bias"].view(
        1, -1, 1, 1
    )
    for k in (0, 1):
        x = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), w[f"stages.{k}.conv.weight"], padding=1)
        scale, shift = w[f"stages.{k}.norm.affine"][codes].view(len(codes), 2, -1, 1, 1).unbind(1)
        x = normed(x, f"stages.{k}.norm.norm") * (1 + scale) + shift
        x = torch.where(x > 0, x, x / 5)
    x = F.conv2d(x, w["to_pixels.weight"], padding=1)
    return (normed(x, "head.norm") * w["head.scale"] + w["head.shift"]).clamp(0, 1)


def test_images_are_those_of_the_layers_written_out(make_generator: Callable[..., ConvGenerator]) -> None:
    generator = make_generator(latent=16, prototypes=3).eval()
    with torch.no_grad():
        for stage in generator.stages:
            stage.norm.affine.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    latents, labels = latents_and_labels(32, 16)
    torch.testing.assert_close(
        generator(latents, labels).double(), by_hand(generator, latents, labels), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("size", "maps"),
    [(4, [2, 2, 4]), (5, [2, 3, 5]), (8, [2, 4, 8]), (28, [7, 14, 28]), (32, [8, 16, 32]), (64, [8, 16, 32, 64])],
)
def test_maps_double_in_two_stages_at_least_and_from_eight_pixels_or_less(
    make_generator: Callable[..., ConvGenerator], size: int, maps: list[int]
) -> None:
    generator = make_generator(size=size, width=4)
    assert generator.sizes == maps
    assert [(stage.conv.in_channels, stage.conv.out_channels) for stage in generator.stages] == [(8, 8)] * (
        len(maps) - 2
    ) + [(8, 4)]


def test_a_new_norm_is_nearly_the_plain_one() -> None:
    torch.manual_seed(0)
    assert 0.01 < float(ClassNorm(64, 30).affine.detach().std()) < 0.03


def test_pixels_are_not_rounded_by_autocast(make_generator: Callable[..., ConvGenerator]) -> None:
    generator, found = make_generator().eval(), []
    generator.head.norm.register_forward_pre_hook(lambda _, given: found.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(*latents_and_labels(4))
    assert found == [torch.float32]
    assert images.dtype == torch.float32


def test_pixels_begin_around_grey_where_nothing_is_known_of_images() -> None:
    generator = PixelGenerator(classes=3, channels=2, size=4)
    for latent, pixel in ((0.0, 0.5), (1.0, 0.75), (-2.0, 0.0)):
        images = generator(torch.full((2, generator.latent), latent), torch.zeros(2, dtype=torch.int64))
        assert torch.equal(images, torch.full((2, 2, 4, 4), pixel))
