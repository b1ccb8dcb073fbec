"""The Triton kernels of norms.py against float64: on a GPU, or where there is none by Triton's interpreter."""

import copy
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
from triton.runtime.errors import InterpreterError

from dfkd import collectives, norms
from dfkd.collectives import sync_batchnorm
from dfkd.errors import UserError
from dfkd.models import build_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(6, 5), (3, 2, 3, 5), (9, 3, 9, 7), (4, 24, 6, 6), (2, 80, 3, 3)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernels in use, in shares so small that several programs of several tiles work on what a test gives."""
    module = importlib.import_module("dfkd.norm_kernels")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions of 10 bits would hide what norms do
    monkeypatch.setattr(module, "VALUES", 128)
    monkeypatch.setattr(module, "PROGRAMS", 4)
    start = module._Rows.start

    def counted(rows: Any, kernel: Any, **given: Any) -> None:
        launched[kernel.fn.__name__] += 1
        start(rows, kernel, **given)

    monkeypatch.setattr(module._Rows, "start", counted)
    module.launched = launched = Counter()  # kernels by name, those that go over all rows
    with norms.triton_norms(True):
        try:
            module.normalise(torch.ones(2, 2, device=DEVICE), nn.BatchNorm1d(2, device=DEVICE), moments=True)
        except InterpreterError as error:  # Triton 3.6's does not know NumPy 2.4
            pytest.skip(f"Triton's interpreter does not work here: {error}")
        launched.clear()
        yield module
    del module.launched


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_norm(channels: int, affine: bool, dimensions: int) -> nn.Module:
    kind = nn.BatchNorm1d if dimensions == 2 else nn.BatchNorm2d
    norm = kind(channels, affine=affine, eps=1e-3).to(DEVICE).eval().requires_grad_(False)
    norm.running_mean.copy_(draw(channels, seed=1))
    norm.running_var.copy_(draw(channels, seed=2).square() + 0.1)
    if affine:
        norm.weight.copy_(draw(channels, seed=3))
        norm.bias.copy_(draw(channels, seed=4))
    return norm


def near(value: Tensor, wanted: Tensor, rtol: float) -> None:
    assert value.dtype in (torch.float32, torch.bfloat16)
    torch.testing.assert_close(value.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_moments_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, error: float, affine: bool, tapped: bool, kernels: ModuleType
) -> None:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    norm, channels = make_norm(shape[1], affine, len(shape)), shape[1]
    x = (2 * draw(*shape) + 1).to(dtype).contiguous(memory_format=layout)
    cotangents = [draw(*shape, seed=5).to(dtype), draw(channels, seed=6), draw(channels, seed=7)]
    dims = [d for d in range(x.dim()) if d != 1]

    leaf, seen = x.clone().requires_grad_(), []
    with norms.frozen_norms([norm], (lambda norm, moments: seen.extend(moments)) if tapped else None):
        y = norm(leaf)
    torch.autograd.backward([y, *seen], cotangents[: 1 + len(seen)])
    assert kernels.launched == {"_normalise": 1, "_gradient": 1}

    exact = x.double().requires_grad_()
    wanted = [norm.double()(exact)]
    if tapped:
        wanted += [exact.mean(dims), exact.var(dims, unbiased=False)]
    torch.autograd.backward(wanted, [c.double() for c in cotangents[: len(wanted)]])

    assert len(seen) == 2 * tapped
    near(y.detach(), wanted[0].detach(), error)
    for moment, of_double in zip(seen, wanted[1:]):
        near(moment.detach(), of_double.detach(), 2e-6)  # in float32 whatever x is in
    assert leaf.grad is not None
    assert exact.grad is not None
    assert leaf.grad.dtype == dtype
    assert leaf.grad.stride() == leaf.stride()
    near(leaf.grad, exact.grad, error)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_norm_in_training(
    shape: tuple[int, ...], dtype: torch.dtype, error: float, affine: bool, kernels: ModuleType
) -> None:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    norm = sync_batchnorm(nn.Sequential(make_norm(shape[1], affine, len(shape)))).train().requires_grad_(True)
    twin = copy.deepcopy(norm).double()
    twin[0].__class__ = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    x = (2 * draw(*shape) + 1).to(dtype).contiguous(memory_format=layout)
    exact, x = x.double().requires_grad_(), x.requires_grad_()
    cotangent = draw(*shape, seed=5).to(dtype)
    y, wanted = norm(x), twin(exact)
    y.backward(cotangent)
    assert kernels.launched == {"_normalise": 2, "_sums": 1, "_gradient": 1}
    wanted.backward(cotangent.double())

    near(y.detach(), wanted.detach(), error)
    assert x.grad is not None
    assert exact.grad is not None
    assert x.grad.dtype == dtype
    near(x.grad, exact.grad, error)
    for name, parameter in norm.named_parameters():
        assert parameter.grad is not None
        near(parameter.grad, twin.get_parameter(name).grad, 1e-5)
    for name, buffer in norm[0].named_buffers():
        near(buffer.float(), twin[0].get_buffer(name).double(), 2e-6)
    norm.eval()
    near(norm(x).detach(), twin.eval()(exact).detach(), error)


def test_a_student_learns_through_them_as_torchs_own_norms_would_have_it(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    student = build_model("dfkd:tiny_residual", classes=5, kwargs={"width": 8}).to(DEVICE).train()
    student.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(student).double()
    images = draw(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    held = next(module for module in student.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    next(module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    with norms.learning_norms(student.modules()):
        logits = student(images)
        assert "forward" not in vars(held)
    logits.square().mean().backward()
    twin(images.double()).square().mean().backward()
    learning = sum(isinstance(module, nn.BatchNorm2d) for module in student.modules()) - 1
    assert kernels.launched == {"_normalise": 2 * learning, "_sums": learning, "_gradient": learning}
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        near(parameter.grad, twin.get_parameter(name).grad, 1e-4)
    for name, buffer in student.named_buffers():
        near(buffer.float(), twin.get_buffer(name).double(), 1e-5)
    assert not any("forward" in vars(module) for module in student.modules())


def test_a_norm_of_one_value_is_refused_in_training(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        sync_batchnorm(nn.Sequential(make_norm(3, True, 2))).train()(draw(1, 3))


def test_a_variance_far_from_zero_is_not_lost(kernels: ModuleType) -> None:
    x = (draw(64, 3, 4, 4) * 0.01 + 100).contiguous(memory_format=torch.channels_last)
    norm = make_norm(3, True, 4)
    y, mean, var = kernels.learn(x, norm)
    exact = nn.functional.batch_norm(x.double(), None, None, norm.weight.double(), norm.bias.double(), True, eps=1e-3)
    near(y, exact, 1e-3)  # 100 is rounded to 1e-5 in float32, a thousandth of the deviation
    near(mean, x.double().mean((0, 2, 3)), 1e-6)
    near(var, x.double().var((0, 2, 3), unbiased=False), 1e-4)


def test_gradients_of_any_layout_are_taken(kernels: ModuleType) -> None:
    x = draw(4, 8, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = make_norm(8, True, 4)
    with norms.frozen_norms([norm]):
        norm(x).mean((2, 3)).sum().backward()  # an expanded gradient
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt() / 9
    assert x.grad is not None
    near(x.grad, scale.view(1, -1, 1, 1).expand(x.shape), 2e-6)


@pytest.mark.parametrize("spec", ["dfkd:tiny_residual", "dfkd:tiny_inverted"])
def test_a_network_has_the_same_gradient_as_in_double(spec: str, kernels: ModuleType) -> None:
    torch.manual_seed(0)
    network = build_model(spec, classes=5, kwargs={"width": 8}).eval().requires_grad_(False)
    network.to(DEVICE, memory_format=torch.channels_last)
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]

    def gradient(x: Tensor) -> Tensor:
        seen: list[norms.Moments] = []
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        with norms.frozen_norms(layers, lambda norm, moments: seen.append(moments)):
            logits = network(x)
        (logits.square().sum() + sum(mean.square().sum() + (var + 0.1).sqrt().sum() for mean, var in seen)).backward()
        assert x.grad is not None
        return x.grad

    images = draw(4, 3, 8, 8)
    ours = gradient(images.clone())
    assert kernels.launched == {"_normalise": len(layers), "_gradient": len(layers)}
    network.double()
    near(ours, gradient(images.double()), 1e-4)


@pytest.mark.parametrize("combine", [lambda m, v: m.sum() + 2 * v.sum(), lambda m, v: torch.stack([m, v], 1).sum()])
def test_moments_take_gradients_of_any_layout(combine: Callable[[Tensor, Tensor], Tensor], kernels: ModuleType) -> None:
    x = draw(4, 8, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen: list[Tensor] = []
    norm = make_norm(8, True, 4)
    with norms.frozen_norms([norm], lambda norm, moments: seen.extend(moments)):
        norm(x)
    combine(*seen).backward()
    exact = x.detach().double().requires_grad_()
    combine(exact.mean((0, 2, 3)), exact.var((0, 2, 3), unbiased=False)).backward()
    assert x.grad is not None
    assert exact.grad is not None
    near(x.grad, exact.grad, 1e-5)


def test_what_the_kernels_do_not_take_goes_torchs_way(kernels: ModuleType) -> None:
    norm = make_norm(3, True, 4)
    last = draw(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert kernels.fits(last, norm)
    assert kernels.fits(last.half(), norm)
    assert kernels.fits(draw(4, 3), norm)
    for x in (draw(2, 3, 4, 4), last.double(), last[:, :, :, 1:], last[:0], draw(2, 3, 4), draw(4, 6)):
        assert not kernels.fits(x, norm)
    for name, value in (("running_mean", None), ("bias", None)):
        other = copy.copy(norm)
        other._buffers, other._parameters = dict(norm._buffers), dict(norm._parameters)
        setattr(other, name, value)
        assert not kernels.fits(last, other)
    with norms.frozen_norms([norm]):
        y = norm(draw(2, 3, 4, 4))
    assert torch.equal(y, norm(draw(2, 3, 4, 4)))
    norm.momentum = None  # a cumulative mean
    with norms.learning_norms([norm.train()]):
        norm(last)
    assert norm.num_batches_tracked == 1
    assert not kernels.launched


def test_a_norm_over_several_processes_still_asks_them(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "global_moments", lambda moments: asked.append(len(moments)) or moments)
    network = sync_batchnorm(nn.Sequential(make_norm(5, True, 2))).train()
    with norms.learning_norms(network.modules()):
        network(draw(6, 5))
    assert asked == [1]
    assert not kernels.launched


def test_they_are_taken_in_their_scope_alone() -> None:
    x, norm = draw(4, 3), make_norm(3, True, 2).train()
    for wanted in (False, True, False):
        with norms.triton_norms(wanted), norms.learning_norms([norm]):
            assert ("forward" in vars(norm)) == wanted
            assert (norms._kernels(x, norm) is not None) == wanted
    with pytest.raises(KeyError), norms.triton_norms(True):
        raise KeyError
    assert norms._kernels(x, norm) is None


def test_where_triton_does_not_work_that_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("dfkd.norm_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "dfkd.norm_kernels", None)
    with pytest.raises(
        UserError, match=r"runtime.triton=true, but Triton does not work here \(ModuleNotFoundError.*false$"
    ):
        norms.check_triton(DEVICE)
