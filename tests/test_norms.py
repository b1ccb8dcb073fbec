"""Batch statistics and frozen batch norms: exact gradients, and the same as torch's own, whatever dtype and layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dfkd.models import build_model
from dfkd.norms import batch_moments, frozen_norms

FORMATS = [torch.contiguous_format, torch.channels_last]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(value: Tensor, wanted: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        value.detach(), wanted.detach(), rtol=rtol, atol=rtol * float(wanted.detach().abs().max())
    )


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (2, 3, 4, 5)])
def test_moments_have_exact_gradients(shape: tuple[int, ...]) -> None:
    x = draw(*shape).double().requires_grad_()
    assert torch.autograd.gradcheck(batch_moments, (x,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_moments_are_float32_mean_and_biased_variance(
    memory_format: torch.memory_format, dtype: torch.dtype, error: float
) -> None:
    x = (2 * draw(64, 5, 9, 7) + 1).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    exact = x.detach().double().requires_grad_()
    mean, var = batch_moments(x)
    assert mean.dtype == var.dtype == torch.float32
    wanted = exact.mean((0, 2, 3)), exact.var((0, 2, 3), unbiased=False)
    near(mean.detach().double(), wanted[0].detach(), 1e-6)  # also of bfloat16: it is read, not summed, in it
    near(var.detach().double(), wanted[1].detach(), 1e-5)
    weights = draw(5, seed=1), draw(5, seed=2)
    ((mean * weights[0]).sum() + (var * weights[1]).sum()).backward()
    ((wanted[0] * weights[0]).sum() + (wanted[1] * weights[1]).sum()).backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert x.grad.dtype == dtype
    near(x.grad.double(), exact.grad, error)


def test_moments_of_one_value_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch statistics of \(1, 3, 1, 1\) need more than one value per channel"):
        batch_moments(draw(1, 3, 1, 1))


# --- frozen norms ---


def make_norm(kind: Callable[..., nn.Module] = nn.BatchNorm2d, affine: bool = True) -> nn.Module:
    norm = kind(3, affine=affine).eval().requires_grad_(False)
    norm.running_mean.copy_(draw(3, seed=1))
    norm.running_var.copy_(draw(3, seed=2).square() + 0.1)
    if affine:
        norm.weight.copy_(draw(3, seed=3))
        norm.weight[1] = 0  # a channel that training gave up
        norm.bias.copy_(draw(3, seed=4))
    return norm


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (6, 3)),
        (nn.BatchNorm1d, (3, 3, 2)),
        (nn.BatchNorm2d, (2, 3, 2, 2)),
        (nn.BatchNorm3d, (2, 3, 2, 1, 2)),
    ],
)
def test_frozen_norms_have_exact_gradients(
    kind: Callable[..., nn.Module], shape: tuple[int, ...], affine: bool, tapped: bool
) -> None:
    norm = make_norm(kind, affine).double()

    def call(x: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        with frozen_norms([norm], (lambda norm, moments: seen.extend(moments)) if tapped else None):
            return norm(x), *seen

    x = draw(*shape).double().requires_grad_()
    assert len(call(x)) == (3 if tapped else 1)
    assert torch.autograd.gradcheck(call, (x,))


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_frozen_norms_give_what_torch_gives(
    memory_format: torch.memory_format, dtype: torch.dtype, error: float, tapped: bool
) -> None:
    norm, weights = make_norm(), [draw(3, seed=5), draw(3, seed=6)]
    x = (2 * draw(16, 3, 9, 7) + 1).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    cotangent = draw(16, 3, 9, 7, seed=7).to(dtype).contiguous(memory_format=memory_format)
    seen: list[Tensor] = []
    with frozen_norms([norm], (lambda norm, moments: seen.extend(moments)) if tapped else None):
        y = norm(x)
    wanted = norm(twin)
    assert torch.equal(y, wanted)
    torch.autograd.backward([y, *seen], [cotangent, *weights[: len(seen)]])
    exact = twin.double()
    moments = [exact.mean((0, 2, 3)), exact.var((0, 2, 3), unbiased=False)] if tapped else []
    torch.autograd.backward([wanted, *moments], [cotangent, *(w.double() for w in weights[: len(moments)])])
    for value, moment in zip(seen, moments, strict=True):
        near(value.double(), moment)
    assert x.grad is not None
    assert twin.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.is_contiguous(memory_format=memory_format)
    near(x.grad, twin.grad, error)


@pytest.mark.parametrize("spec", ["dfkd:resnet20", "timm:resnet10t", "torchvision:mobilenet_v2"])
def test_whole_networks_have_the_same_gradient(spec: str) -> None:
    torch.manual_seed(0)
    network = build_model(spec, classes=5).eval().requires_grad_(False)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def gradient(fast: bool) -> Tensor | None:
        x, seen = draw(4, 3, 32, 32).requires_grad_(), []
        handles = [] if fast else [n.register_forward_pre_hook(lambda n, i: seen.append(plain(i[0]))) for n in norms]
        with frozen_norms(norms if fast else [], lambda norm, moments: seen.append(moments)):
            logits = network(x)
        for handle in handles:
            handle.remove()
        assert len(seen) == len(norms)
        (logits.square().sum() + sum(mean.square().sum() + var.sqrt().sum() for mean, var in seen)).backward()
        return x.grad

    near(gradient(True), gradient(False), rtol=1e-4)  # type: ignore[arg-type]


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)


def test_only_norms_that_are_frozen_change_and_none_stays_changed() -> None:
    training, learning, known = make_norm().train(), make_norm().requires_grad_(True), make_norm()

    class Other(nn.BatchNorm2d):
        """A kind that does more than the norm."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    other = Other(3).eval().requires_grad_(False)
    norms, seen, x = [training, learning, known, other], [], draw(4, 3, 5, 5).requires_grad_()
    wanted = [norm(x).detach() for norm in norms]
    with pytest.raises(KeyError), frozen_norms(norms, lambda norm, moments: seen.append(norm)):  # noqa: PT012
        assert ["forward" in vars(norm) for norm in norms] == [False, False, True, False]
        for norm, y in zip(norms, wanted):
            assert torch.equal(norm(x), y)
        raise KeyError
    assert seen == norms
    assert not any("forward" in vars(norm) or norm._forward_pre_hooks for norm in norms)
    assert training.num_batches_tracked == 2


def test_scopes_within_each_other_see_the_same() -> None:
    norm, x = make_norm(), draw(4, 3, 5, 5).requires_grad_()
    outer: list[Tensor] = []
    inner: list[Tensor] = []
    with (
        frozen_norms([norm], lambda norm, moments: outer.extend(moments)),
        frozen_norms([norm], lambda norm, moments: inner.extend(moments)),
    ):
        norm(x)
    near(torch.stack(inner), torch.stack(outer), 1e-6)


def test_a_frozen_norm_keeps_no_input_for_its_backward() -> None:
    norm, x, kept = make_norm(), draw(4, 3, 5, 5).requires_grad_(), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t),
        frozen_norms([norm]),
    ):
        norm(x)
    assert sum(kept) < x.numel()


def test_one_value_per_channel_is_refused_by_a_tapped_norm() -> None:
    with frozen_norms([norm := make_norm()], lambda *_: None), pytest.raises(ValueError, match="more than one value"):
        norm(draw(1, 3, 1, 1))


# --- compiled ---


def test_compiled_a_tapped_network_gives_the_same_in_one_graph() -> None:
    torch.manual_seed(0)
    network = build_model("dfkd:tiny_residual", classes=3, channels=1, kwargs={"width": 8}).eval().requires_grad_(False)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    backend = CompileCounterWithBackend("aot_eager")
    x, weights = draw(6, 1, 8, 8), [draw(norm.num_features, seed=k) for k, norm in enumerate(norms)]

    def answer() -> tuple[Tensor, ...]:
        moments: list[Tensor] = []
        leaf = x.clone().requires_grad_()
        with frozen_norms(norms, lambda norm, seen: moments.extend(seen)):
            y = network(leaf)
        total = sum((weight * moment).sum() for weight, moment in zip(weights, moments[1::2]))
        (total + y.square().sum()).backward()
        assert leaf.grad is not None
        return y, *moments, leaf.grad

    wanted = answer()
    network.compile(backend=backend)
    for _ in range(2):  # a scope of its own for every step: what is compiled holds for the next one too
        for value, of_eager in zip(answer(), wanted, strict=True):
            near(value, of_eager)
    assert backend.frame_count == (7 if torch.__version__ < "2.12" else 1)  # 2.11 breaks off at each tapped norm


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_moments_of_a_tapped_norm_have_their_gradient_in_bfloat16_too(memory_format: torch.memory_format) -> None:
    """Asked for alone: beside the output's gradient theirs, a share of 1 / count, would be within its rounding."""
    x = (2 * draw(4, 3, 5, 5) + 1).bfloat16().contiguous(memory_format=memory_format).requires_grad_()
    twin, seen = x.detach().double().requires_grad_(), []
    with frozen_norms([norm := make_norm()], lambda norm, moments: seen.extend(moments)):
        norm(x)
    ((seen[0] * draw(3, seed=5)).sum() + (seen[1] * draw(3, seed=6)).sum()).backward()
    mean, var = twin.mean((0, 2, 3)), twin.var((0, 2, 3), correction=0)
    ((mean * draw(3, seed=5)).sum() + (var * draw(3, seed=6)).sum()).backward()
    near(x.grad.double(), twin.grad, 2e-2)  # type: ignore[union-attr, arg-type]
