"""Checkpoints of any kind, and folders that a model is rebuilt from: what is read, and every error line."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from networks_fixture import error_line, vary
from safetensors.torch import save_file
from torch import Tensor, nn

from dfkd.compress.files import load_compressed
from dfkd.models import build_model, load_weights, read_checkpoint, save_model
from dfkd.models.checkpoints import not_finite, read_description

TIED = """
from torch import nn

class Tied(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.a = nn.Linear(classes, classes)
        self.b = nn.Linear(classes, classes)
        self.b.weight = self.a.weight
"""


# --- reading checkpoints ---


def linear_state() -> dict[str, Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, -1.0])}


def write(path: Path, content: dict) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key in expected:
        assert torch.equal(state[key], expected[key])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".th"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_are_seen_through(tmp_path, suffix, prefix):
    path = write(tmp_path / f"net{suffix}", {prefix + key: value for key, value in linear_state().items()})
    assert_same(read_checkpoint(path), linear_state())


def test_a_submodule_called_module_is_no_prefix_unless_all_keys_have_it(tmp_path):
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(1)}
    assert_same(read_checkpoint(write(tmp_path / "net.pt", state)), state)


@pytest.mark.parametrize("prefix", ["net.", "model.", "net.module."])
def test_a_model_that_was_an_attribute_of_what_was_saved_is_loaded(tmp_path, prefix):
    state = {prefix + key: value for key, value in linear_state().items()}
    model = nn.Linear(3, 2)
    load_weights(model, write(tmp_path / "net.pt", state))
    assert_same(model.state_dict(), linear_state())
    other = write(tmp_path / "other.pt", {**state, "head.weight": torch.ones(1)})
    assert "unexpected" in error_line(load_weights, nn.Linear(3, 2), other)


def test_a_name_for_the_model_is_no_wrapper_and_no_other_tensors_are_taken_for_its_weights(tmp_path):
    other = {key: torch.zeros_like(value) for key, value in linear_state().items()}
    named = {"model": "resnet18", "net": linear_state(), "ema": other}
    assert_same(read_checkpoint(write(tmp_path / "named.pt", named)), linear_state())
    for content in ({**linear_state(), "momentum": other}, {"best": other, "epoch": 3}):
        assert "not tensors; save model.state_dict()" in error_line(read_checkpoint, write(tmp_path / "m.pt", content))


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["model", "state_dict"], ["net"], ["model_state_dict"]])
def test_wrapper_keys_are_seen_through(tmp_path, keys):
    content: dict = linear_state()
    for key in keys:
        content = {key: content, "epoch": 3}
    assert_same(read_checkpoint(str(write(tmp_path / "net.pt", content))), linear_state())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_torn_file_is_one_line(tmp_path, suffix, share):
    path = write(tmp_path / f"net{suffix}", linear_state())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    line = error_line(read_checkpoint, path)
    assert "torn" in line
    assert str(path) in line


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_of_more_than_tensors_are_refused_unrun(tmp_path):
    torch.save(nn.Linear(3, 2), tmp_path / "whole.pt")
    line = error_line(read_checkpoint, tmp_path / "whole.pt")
    assert "torch.nn.modules.linear.Linear" in line
    assert "model.state_dict()" in line
    torch.save({"weight": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    assert "Python objects" in error_line(read_checkpoint, tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_other_unreadable_checkpoints(tmp_path):
    assert "does not exist" in error_line(read_checkpoint, tmp_path / "absent.pt")
    assert "is a folder without model.safetensors and model.json" in error_line(read_checkpoint, tmp_path)
    line = error_line(read_checkpoint, write(tmp_path / "net.bin", linear_state()))
    assert "'.bin'; readable: .safetensors, .pt, .pth, .th" in line
    line = error_line(read_checkpoint, write(tmp_path / "net.pt", {"nets": linear_state(), "epoch": 3}))
    assert "nets, epoch not tensors" in line
    assert "but a Tensor" in error_line(read_checkpoint, write(tmp_path / "tensor.pt", torch.ones(2)))


def test_a_url_is_fetched_once_and_again_after_a_torn_download(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "a" / "net.pth", linear_state())
    other = write(tmp_path / "b" / "net.pth", {"weight": torch.zeros(1)})
    whole = first.read_bytes()
    first.write_bytes(whole[:200])
    assert "torn" in error_line(read_checkpoint, first.as_uri())
    first.write_bytes(whole)
    assert_same(read_checkpoint(first.as_uri()), linear_state())
    assert_same(read_checkpoint(other.as_uri()), {"weight": torch.zeros(1)})
    first.unlink()
    assert_same(read_checkpoint(first.as_uri()), linear_state())
    assert "cannot be fetched" in error_line(read_checkpoint, (tmp_path / "absent.pth").as_uri())
    assert "cannot be fetched" in error_line(read_checkpoint, "nonsense://host/net.pth")


# --- loading weights ---


def test_weights_load_into_wrapped_models_too(tmp_path):
    path = write(tmp_path / "net.safetensors", linear_state())
    for wrapped in (nn.Linear(3, 2), nn.DataParallel(nn.Linear(3, 2)), torch.compile(nn.Linear(3, 2))):
        load_weights(wrapped, path)
        assert torch.equal(next(wrapped.parameters()), linear_state()["weight"])


def test_build_model_loads_its_weights(tmp_path):
    saved = vary(build_model("dfkd:tiny_plain", classes=4))
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in saved.state_dict().items()}}, path)
    assert_same(build_model("dfkd:tiny_plain", classes=4, weights=str(path)).state_dict(), saved.state_dict())


def test_misfits_are_listed_by_key_and_shape_and_nothing_is_loaded(tmp_path):
    state = {**linear_state(), "weight": torch.ones(4, 3), "extra": torch.ones(1)}
    del state["bias"]
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    line = error_line(load_weights, model, write(tmp_path / "net.pt", state))
    for part in (
        "1 missing: bias",
        "1 unexpected: extra",
        "weight (4, 3) in the file, (2, 3) in the model",
        "Linear",
    ):
        assert part in line
    assert torch.equal(model.weight, before)


def test_long_lists_of_misfits_are_cut(tmp_path):
    path = write(tmp_path / "net.pt", {f"x{k}": torch.ones(1) for k in range(8)})
    line = error_line(load_weights, nn.Linear(3, 2), path)
    assert "8 unexpected: x0, x1, x2, x3, x4 and 3 more" in line
    assert "2 missing: weight, bias" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_the_tensor(tmp_path, value):
    state = linear_state()
    state["bias"][1] = value
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    assert "nan or inf in bias" in error_line(load_weights, model, write(tmp_path / "net.pt", state))
    assert torch.equal(model.weight, before)


def test_a_mask_of_infinities_is_no_broken_weight(tmp_path):
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.zeros(2, 2))
    state = linear_state() | {"mask": torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])}
    load_weights(model, write(tmp_path / "net.pt", state))
    assert model.mask[0, 1] == -torch.inf
    assert not not_finite(model)
    model.weight.data[0, 0] = torch.nan
    assert not_finite(model) == ["weight"]


def test_only_num_batches_tracked_may_be_absent(tmp_path):
    model = nn.BatchNorm2d(2)
    state = {key: value + 1 for key, value in model.state_dict().items() if key != "num_batches_tracked"}
    load_weights(model, write(tmp_path / "net.safetensors", state))
    assert model.weight.tolist() == [2, 2]
    del state["running_var"]
    assert "1 missing: running_var" in error_line(load_weights, model, write(tmp_path / "net.safetensors", state))


# --- model folders ---


def description(spec: str, **more) -> dict:
    return {"model": spec, "kwargs": {}, "classes": 4, "channels": 1, "mean": [0.5], "std": [0.2], **more}


@pytest.mark.parametrize("name", ["tiny_residual", "mnasnet"])  # mnasnet refuses a state dict without metadata
def test_a_saved_model_is_rebuilt_from_its_folder_alone(tmp_path, name):
    kwargs = {"width": 5} if name.startswith("tiny") else {"dropout": 0.1}
    saved = vary(build_model(f"dfkd:{name}", classes=4, channels=1, kwargs=kwargs))
    saved.to(memory_format=torch.channels_last)  # weights that are not contiguous
    told = description(f"dfkd:{name}", kwargs=kwargs, input_size=28)
    save_model(tmp_path / "student", saved, told)
    loaded = load_compressed(tmp_path / "student").model
    assert read_description(tmp_path / "student") == told
    assert not loaded.training
    images = torch.rand(2, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), saved(images))
    assert_same(read_checkpoint(tmp_path / "student"), saved.state_dict())
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]


def test_a_folder_without_counts_of_batches_loads(tmp_path):
    saved = vary(build_model("dfkd:tiny_plain", classes=4, channels=1))
    save_model(tmp_path, saved, description("dfkd:tiny_plain"))
    kept = {name: each for name, each in saved.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "model.safetensors")
    assert_same({name: load_compressed(tmp_path).model.state_dict()[name] for name in kept}, kept)


def test_tied_weights_and_wrapped_models_are_saved(tmp_path):
    (tmp_path / "own_nets.py").write_text(TIED)
    model = f"python:{tmp_path / 'own_nets.py'}:Tied"
    saved = build_model(model, classes=4, trust_code=True)
    save_model(tmp_path / "m", nn.DataParallel(saved), description(model))
    loaded = load_compressed(tmp_path / "m", trust_code=True)
    assert_same(loaded.model.state_dict(), saved.state_dict())
    assert "trust_code=true on the command line, in Python trust_code=True" in error_line(
        load_compressed, tmp_path / "m"
    ).replace("`", "")
    (tmp_path / "own_nets.py").rename(tmp_path / "moved.py")
    line = error_line(load_compressed, tmp_path / "m", trust_code=True)
    assert f"no file '{tmp_path / 'own_nets.py'}'" in line
    assert "load_compressed takes model='python:PATH:NAME'" in line
    again = load_compressed(tmp_path / "m", trust_code=True, model=f"python:{tmp_path / 'moved.py'}:Tied")
    assert_same(again.model.state_dict(), saved.state_dict())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_model_and_no_litter(tmp_path, monkeypatch, step):
    network = build_model("dfkd:tiny_plain", classes=4, channels=1)
    save_model(tmp_path, network, description("dfkd:tiny_plain"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        line = error_line(save_model, tmp_path, vary(network), description("dfkd:tiny_plain", mean=[0.1]))
    assert "No space left on device" in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_errors_of_model_folders(tmp_path):
    network = build_model("dfkd:tiny_plain", classes=4, channels=1)
    line = error_line(save_model, tmp_path / "m", network, {"model": "dfkd:tiny_plain"})
    assert "absent: classes, channels" in line
    assert not (tmp_path / "m").exists()
    assert "No such file" in error_line(load_compressed, tmp_path / "m")
    save_model(tmp_path / "m", network, description("dfkd:tiny_plain"))
    told = tmp_path / "m" / "model.json"
    whole = told.read_text()
    told.write_text(whole[:20])
    assert "torn or not JSON" in error_line(load_compressed, tmp_path / "m")
    told.write_text(json.dumps({"model": "dfkd:tiny_plain", "classes": 4}))
    assert "lacks channels" in error_line(load_compressed, tmp_path / "m")
    told.write_text(whole.replace('"channels": 1', '"channels": 3'))
    line = error_line(load_compressed, tmp_path / "m")
    assert "does not fit dfkd:tiny_plain" in line
    assert "torch.Size([16, 1, 3, 3]) from checkpoint, the shape in current model is torch.Size([16, 3, 3, 3])" in line
