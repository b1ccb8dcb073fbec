"""Compressed models in folders: what is loaded computes bitwise what was saved, and what does not fit is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks_fixture import images, named, vary
from safetensors.torch import load_file, save_file
from torch import nn

from dfkd.classifier import Classifier
from dfkd.compress.channels import changed_shapes, shapes, shrink
from dfkd.compress.files import load_compressed, save_compressed
from dfkd.compress.graph import chains, network_of
from dfkd.compress.prune import prune
from dfkd.compress.quantize import quantize
from dfkd.compress.quantizers import activation_quantizers, quantized_layers
from dfkd.compress.tracing import trace
from dfkd.errors import UserError
from dfkd.models import build_model

STREAM = [images(8, 1, 8, 8, seed=seed) for seed in range(2)]
X = images(4, 1, 8, 8, seed=9)


def wrapped(spec: str, low: float = 0.5) -> Classifier:
    network = named(spec, low=low, **({} if "wrn" in spec else {"width": 4}))
    return Classifier(network, mean=[0.4], std=[0.3], input_size=8).eval()


def pruned(given: Classifier) -> dict[str, Any]:
    """Half of the channels of every chain taken out, in place; the structure that tells."""
    before = shapes(given.model)
    for chain in chains(trace(given.model)):
        made: Any = given.model.get_submodule(chain.first)
        shrink(given.model, chain, torch.arange(0, len(made.weight), 2))
    changed = changed_shapes(before, shapes(given.model))
    assert changed
    return {"channels": changed}


def described(spec: str, structure: dict[str, Any], **more: Any) -> dict[str, Any]:
    kwargs = {} if "wrn" in spec else {"width": 4}
    sizes = {"model": spec, "classes": 3, "channels": 1, "kwargs": kwargs}
    return {**sizes, "mean": [0.4], "std": [0.3], "input_size": 8, "structure": structure, **more}


def train(given: nn.Module, **options: Any) -> Any:
    return quantize(given, STREAM, method="train", images=16, steps=3, warm_start=3, warmup=0, **options)


def nearest(given: nn.Module, **options: Any) -> Any:
    return quantize(given, STREAM, method="nearest", images=16, **options)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "W8A8": lambda given: nearest(given, bits=8),
    "W4A4": lambda given: nearest(given, bits=(4, 4)),
    "trained W4A4": lambda given: train(given, bits=(4, 4)),
    "trained W8A8": lambda given: train(given, bits=8),
    "trained W2A4 without hints": lambda given: train(given, bits=(2, 4), hints=0.0),
}


def cases() -> Iterator[Any]:
    """Every way with one network whole and one pruned, every network in one way."""
    for way in ["float", *WAYS]:
        yield pytest.param("dfkd:tiny_plain", False, way, id=f"tiny_plain {way}")
        yield pytest.param("dfkd:tiny_residual", True, way, id=f"tiny_residual pruned {way}")
    for spec in ("dfkd:tiny_inverted", "dfkd:resnet20", "dfkd:wrn_16_1"):
        yield pytest.param(spec, False, "trained W4A4", id=f"{spec} trained W4A4")


@pytest.mark.parametrize(("spec", "cut", "way"), list(cases()))
def test_what_is_loaded_computes_what_was_saved(tmp_path: Path, spec: str, cut: bool, way: str) -> None:
    given = wrapped(spec, low=-0.5)
    structure = pruned(given) if cut else {}
    model: Any = given
    if way != "float":
        done = WAYS[way](given)
        model, structure = done.model, {**structure, **done.structure}
    save_compressed(tmp_path, model, described(spec, structure))
    loaded = load_compressed(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(X), model(X))
    assert torch.equal(loaded(images(2, 1, 5, 5)), model(images(2, 1, 5, 5)))
    assert loaded.normalisation == ([0.4], [0.3])
    assert loaded.input_size == 8
    assert type(loaded) is Classifier
    tensors = load_file(tmp_path / "model.safetensors")
    codes = [tensors[f"{name}.weight"] for name in quantized_layers(network_of(model))]
    assert len(codes) == (0 if way == "float" else len(structure["quantized"]["bits"]))
    assert all(each.dtype == torch.int8 for each in codes)


def test_bits_zeros_and_float_layers_come_back(tmp_path: Path) -> None:
    spec = "dfkd:tiny_plain"
    overrides = {"features.3": [2, 5], "features.7": [6, 3]}
    done = nearest(wrapped(spec), bits=(4, 4), overrides=overrides, ignore=["features.10", "linear"])
    save_compressed(tmp_path, done.model, described(spec, done.structure))
    loaded, saved = (network_of(each) for each in (load_compressed(tmp_path), done.model))
    assert torch.equal(loaded(X), saved(X))
    found = {name: layer.quantizer.bits for name, layer in quantized_layers(loaded).items()}
    assert found == {f"features.{k}": bits for k, bits in ((0, 8), (3, 2), (7, 6), (14, 4), (17, 4))}
    assert type(loaded.linear) is nn.Linear
    about = {name: (each.bits, each.zero) for name, each in activation_quantizers(loaded).items()}
    assert about == {name: (each.bits, each.zero) for name, each in activation_quantizers(saved).items()}
    assert {bits for bits, _ in about.values()} == {8, 5, 3, 4}
    assert {zero > 0 for _, zero in about.values()} == {True, False}
    assert loaded.meta["bits"] == {name: list(pair) for name, pair in done.model.model.meta["bits"].items()}


@pytest.mark.parametrize("key", ["quantized", "channels"])
def test_what_would_not_load_is_not_saved(tmp_path: Path, key: str) -> None:
    spec = "dfkd:tiny_residual"
    given = wrapped(spec)
    done = nearest(given, bits=4) if key == "quantized" else prune(given, [X], 0.5, images=len(X))
    with pytest.raises(UserError, match=r"is (quantised|pruned), which its description does not say.*'structure'"):
        save_compressed(tmp_path / "it", done.model, described(spec, {}))
    assert not (tmp_path / "it").exists()


def test_what_a_description_does_not_say_of_the_images_is_the_models(tmp_path: Path) -> None:
    given = wrapped("dfkd:tiny_plain")
    about = {"model": "dfkd:tiny_plain", "classes": 3, "channels": 1, "kwargs": {"width": 4}}
    save_compressed(tmp_path / "own", given, about)
    assert torch.equal(load_compressed(tmp_path / "own")(X), given(X))
    save_compressed(tmp_path / "said", given, {**about, "mean": [], "std": [], "input_size": None})
    loaded = load_compressed(tmp_path / "said")
    assert loaded.normalisation == ([], [])
    assert loaded.input_size is None
    assert torch.equal(loaded(X), given.model(X))
    assert not torch.equal(loaded(X), given(X))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised and pruned resnet20."""
    folder = tmp_path_factory.mktemp("saved")
    given = wrapped("dfkd:resnet20")
    structure = pruned(given)
    done = nearest(given, bits=(4, 4))
    save_compressed(folder, done.model, described("dfkd:resnet20", {**structure, **done.structure}))
    assert torch.equal(load_compressed(folder)(X), done.model(X))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def put(about: dict[str, Any], *path: str, value: Any = None) -> None:
    """Set, or without a value remove, what stands at a path."""
    for key in path[:-1]:
        about = about[key]
    if value is None:
        del about[path[-1]]
    else:
        about[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("structure", "quantized", "bits"), None, "bits"),
        (("structure", "quantized", "zeros"), None, "signed"),
        (("structure", "quantized", "bits", "layer9.conv"), [4, 4], "layer9"),
        (("structure", "quantized", "bits", "layer1.0.conv1"), None, r"layer1\.0\.conv1"),
        (("structure", "quantized", "bits", "layer1.0.conv1"), 4, "does not fit"),
        (("structure", "quantized", "bits", "layer1.0.conv1"), [4, 5], "relu_5"),
        (("structure", "quantized"), None, "does not fit"),
        (("structure", "channels", "layer9.conv"), [4, 4], "has no layer layer9.conv"),
        (("structure", "channels", "layer1.0.conv1"), [400, 4], "does not fit"),
        (("structure", "channels", "layer1.0.conv1"), [2], "does not fit"),
        (("structure", "channels"), None, "size mismatch"),
        (("structure",), [1, 2], "does not fit"),
        (("model",), "dfkd:tiny_plain", "does not fit"),
        (("kwargs", "width"), 5, "does not fit"),
        (("model",), None, "lacks model"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_in_one_line(
    folder: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    about = json.loads((folder / "model.json").read_text())
    put(about, *path, value=value)
    (folder / "model.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=message) as error:
        load_compressed(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_folder_from_before_tensors_had_zero_points_loads(folder: Path) -> None:
    about = json.loads((folder / "model.json").read_text())
    signed = list(about["structure"]["quantized"].pop("zeros"))
    about["structure"]["quantized"]["signed"] = signed
    (folder / "model.json").write_text(json.dumps(about))
    found = activation_quantizers(network_of(load_compressed(folder)))
    assert 0 < len(signed) < len(found)
    assert {name: each.zero for name, each in found.items() if each.zero} == {
        name: 2 ** (found[name].bits - 1) for name in signed
    }


@pytest.mark.parametrize("key", ["conv1.weight", "conv1.quantizer.scale", "conv1.bias", "quantizers.relu_4.scale"])
@pytest.mark.parametrize("change", ["absent", "of another shape"])
def test_tensors_that_do_not_fit_are_refused_by_name(folder: Path, key: str, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    wrong = tensors.pop(key)
    if change != "absent":
        tensors[key] = torch.cat([wrong.flatten(), wrong.flatten()])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_compressed(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    if change == "absent":
        assert key in str(error.value)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no model folder"):
        load_compressed(tmp_path)


WRAPPED = """
from torch import nn

from dfkd.models import build_model


class Wrapped(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.module = build_model("dfkd:tiny_plain", classes=classes, channels=channels, kwargs={"width": 4})

    def forward(self, x):
        return self.module(x)
"""


@pytest.mark.parametrize("bits", [None, 4])
def test_a_network_whose_weights_all_stand_under_a_wrapper_comes_back(tmp_path: Path, bits: int | None) -> None:
    (tmp_path / "nets.py").write_text(WRAPPED)
    spec = f"python:{tmp_path / 'nets.py'}:Wrapped"
    given = Classifier(vary(build_model(spec, classes=3, channels=1, trust_code=True))).eval()
    done = nearest(given, bits=bits) if bits else None
    about = {"model": spec, "classes": 3, "channels": 1, "structure": done.structure if done else {}}
    save_compressed(tmp_path / "saved", done.model if done else given, about)
    loaded = load_compressed(tmp_path / "saved", trust_code=True)
    assert torch.equal(loaded(X), (done.model if done else given)(X))
