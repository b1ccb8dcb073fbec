"""Repairs against least squares written out by hand, and against what cannot be told from the unpruned network."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from torch import Tensor, nn

from dfkd.compress.channels import inputs, outputs
from dfkd.compress.repair import _scale, _solution, least_squares, output_errors, paired_batch_norm
from dfkd.errors import UserError
from dfkd.models import build_model


def patches_by_loops(x: Tensor, conv: Any) -> np.ndarray:
    """What every output position of a zero-padded convolution sees, [positions, C * kh * kw], position by position."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    rows = [
        image[:, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw].ravel()
        for image in padded
        for top in range(0, image.shape[1] - dh * (kh - 1), sh)
        for left in range(0, image.shape[2] - dw * (kw - 1), sw)
    ]
    return np.array(rows)


CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "bias": False},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", CONVS)
def test_a_convolution_gets_the_least_squares_solution_on_its_support(options: dict[str, Any], masked: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 3, **options)
    teacher, pruned = nn.Sequential(nn.Identity(), conv), nn.Sequential(nn.Hardtanh(-0.5, 0.5), copy.deepcopy(conv))
    support = torch.rand(conv.weight.shape) < 0.6 if masked else torch.ones_like(conv.weight).bool()
    pruned[1].weight.data *= support
    x = torch.randn(20, 4, 7, 6)
    columns = patches_by_loops(x.clamp(-0.5, 0.5), conv)
    free = support.flatten(1).numpy()
    if conv.bias is not None:
        columns = np.hstack([columns, np.ones((len(columns), 1))])
        free = np.hstack([free, np.ones((3, 1), bool)])
    z = teacher(x).detach().double().permute(0, 2, 3, 1).reshape(len(columns), 3).numpy()
    expected = np.zeros(free.shape)
    for k in range(3):
        expected[k, free[k]] = np.linalg.lstsq(columns[:, free[k]], z[:, k], rcond=None)[0]
    least_squares(teacher, pruned, x, {}, supports={"1": support}, ridge=1e-9)
    found = pruned[1].weight.detach().flatten(1).numpy()
    np.testing.assert_allclose(found, expected[:, : found.shape[1]], atol=1e-4)
    if conv.bias is not None:
        np.testing.assert_allclose(pruned[1].bias.detach().numpy(), expected[:, -1], atol=1e-4)
    assert (pruned[1].weight[~support] == 0).all()


def test_grouped_convolutions_are_solved_group_by_group() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False)).eval()
    pruned = copy.deepcopy(teacher)
    nn.init.normal_(pruned[0].weight)
    least_squares(teacher, pruned, torch.randn(20, 4, 7, 7), {}, ridge=1e-9)
    torch.testing.assert_close(pruned[0].weight, teacher[0].weight, rtol=0, atol=1e-4)


def duplicated(spatial: bool) -> nn.Module:
    """conv-bn-relu-conv-bn-linear whose channels 4 to 7 are those of 0 to 3 but for their scale."""
    head = [nn.Flatten(), nn.Linear(6 * 36, 5)] if spatial else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(6)
    body = [nn.Conv2d(3, 8, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, bias=False), norms[1]]
    network = randomise(nn.Sequential(*body, *head), 0).eval()
    with torch.no_grad():
        for tensor in (*network[0].parameters(), *norms[0].parameters(), *norms[0].buffers()):
            if tensor.dim():
                tensor[4:] = tensor[:4]
        norms[0].weight[4:] *= 2
        norms[0].bias[4:] *= 2
    return network


@pytest.mark.parametrize("spatial", [False, True])
def test_channels_that_others_make_up_for_are_restored(spatial: bool) -> None:
    torch.manual_seed(0)
    teacher, x, keep = duplicated(spatial), torch.rand(64, 3, 6, 6), torch.arange(4)
    pruned = copy.deepcopy(teacher)
    outputs(pruned[0], keep)
    outputs(pruned[1], keep)
    inputs(pruned[3], keep)
    assert (pruned(x) - teacher(x)).abs().max() > 0.1
    least_squares(teacher, pruned, x, {"0": keep, "1": keep}, ridge=1e-8)
    fresh = torch.rand(16, 3, 6, 6)
    torch.testing.assert_close(pruned(fresh), teacher(fresh), rtol=0, atol=1e-3)


def test_an_intercept_without_a_bias_goes_to_the_batch_norm() -> None:
    """Dead inputs were constant: only an intercept can put them back."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)
    teacher = randomise(nn.Sequential(nn.Hardtanh(1.0, 1.1), conv, norm), 0).eval()  # about 1 everywhere
    pruned = copy.deepcopy(teacher)
    pruned[0] = nn.Hardtanh(0.0, 1e-6)
    x = torch.randn(32, 2, 4, 4)
    least_squares(teacher, pruned, x, {})
    torch.testing.assert_close(pruned(x).mean((0, 2, 3)), teacher(x).mean((0, 2, 3)), rtol=0, atol=1e-4)
    assert not torch.equal(pruned[2].running_mean, norm.running_mean)


def test_the_last_layer_of_a_branch_makes_up_for_the_shortcut() -> None:
    class Block(nn.Module):
        def __init__(self, shortcut: nn.Module) -> None:
            super().__init__()
            self.shortcut, self.conv, self.bn = shortcut, nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.shortcut(x)

    torch.manual_seed(0)
    teacher = randomise(Block(nn.Identity()), 0).eval()
    pruned = copy.deepcopy(teacher)
    pruned.shortcut = nn.Threshold(1e9, 0.0)  # lacks everything
    x = torch.randn(16, 3, 5, 5)
    least_squares(teacher, pruned, x, {}, ridge=1e-9)
    torch.testing.assert_close(pruned(x), teacher(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("repair", [least_squares, paired_batch_norm])
@pytest.mark.parametrize("model", ["dfkd:resnet20", "dfkd:tiny_inverted", "dfkd:wrn_16_1"])
def test_a_network_that_lost_nothing_stays_as_it_is(repair: Any, model: str) -> None:
    teacher = randomise(build_model(model, classes=3), 0).eval()
    pruned = copy.deepcopy(teacher)
    repair(teacher, pruned, torch.randn(8, 3, 16, 16) * 5, {})
    for key, value in teacher.state_dict().items():
        assert torch.equal(pruned.state_dict()[key], value), key


def test_paired_moments_bring_the_teachers_moments_back() -> None:
    torch.manual_seed(0)
    teacher = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 0).eval()
    pruned = copy.deepcopy(teacher)
    with torch.no_grad():
        pruned[0].weight.mul_(0.5)
        pruned[0].weight[1] = 0  # a channel that is constant now
    x = torch.randn(32, 3, 8, 8)
    paired_batch_norm(teacher, pruned, x, {})
    expected, given = teacher[:2](x), pruned[:2](x)
    torch.testing.assert_close(given.mean((0, 2, 3)), expected.mean((0, 2, 3)), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        given[:, [0, 2, 3]].std((0, 2, 3)), expected[:, [0, 2, 3]].std((0, 2, 3)), rtol=1e-3, atol=0
    )


def test_paired_moments_need_batch_norms() -> None:
    with pytest.raises(UserError, match="Sequential has none; use 'least_squares'"):
        paired_batch_norm(
            nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3)), torch.rand(2, 3, 8, 8), {}
        )


def test_a_solution_that_is_not_finite_is_refused_by_name() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3))
    pruned = copy.deepcopy(teacher)
    pruned[0].weight.data[0] = 3e38  # what it gives is beyond float32
    with pytest.raises(UserError, match="no finite weights for 0"):
        least_squares(teacher, pruned, torch.rand(2, 3, 8, 8), {})


def test_a_linear_layer_on_tokens_is_solved_for_the_outputs_that_are_left() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    pruned, keep = copy.deepcopy(teacher), torch.tensor([0, 2, 5])
    outputs(pruned[0], keep)
    nn.init.normal_(pruned[0].weight)
    x = torch.randn(8, 5, 4)  # [B, tokens, D]
    inputs(pruned[2], keep)
    least_squares(teacher, pruned, x, {"0": keep}, ridge=1e-9)
    torch.testing.assert_close(pruned[0].weight, teacher[0].weight[keep], rtol=0, atol=1e-4)


class Branch(nn.Module):
    """A residual block of half the channels inside, whose last norm silences it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last, self.norm = nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.last(self.between(self.first(x)).relu()))


def test_a_branch_that_is_silent_stays_silent() -> None:
    torch.manual_seed(0)
    teacher = Branch().eval()
    nn.init.zeros_(teacher.norm.weight)
    pruned, keep = copy.deepcopy(teacher), torch.arange(0, 8, 2)
    outputs(pruned.first, keep)
    outputs(pruned.between, keep)
    inputs(pruned.last, keep)
    x = torch.rand(6, 4, 8, 8)
    least_squares(teacher, pruned, x, {"first": keep, "between": keep})
    assert torch.equal(pruned(x), teacher(x))


def test_the_ridge_is_relative_to_the_inputs_alone() -> None:
    gram, cross = torch.diag(torch.tensor([2.0, 4.0, 900.0])).double()[None], torch.ones(1, 3, 1).double()
    found = _solution(gram, cross, None, 2, 0.5)[0, :, 0]  # the third is the column of ones
    assert found.tolist() == pytest.approx([1 / 3.5, 1 / 5.5, 1 / 900], rel=1e-6)


def test_the_error_of_a_layer_is_over_all_images() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 2, 1))
    pruned = copy.deepcopy(teacher)
    nn.init.zeros_(pruned[0].bias)
    x = torch.randn(70, 1, 4, 4) * torch.linspace(0, 3, 70).view(70, 1, 1, 1)  # more than BATCH
    with torch.no_grad():
        wanted = float((pruned(x) - teacher(x)).norm() / teacher(x).norm())
    assert output_errors(teacher, pruned, x, {}, ["0"])["0"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "circular"])
def test_a_convolution_is_solved_by_what_it_sees_beyond_the_edge(padding: str) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding))
    pruned = copy.deepcopy(teacher)
    nn.init.normal_(pruned[0].weight)
    least_squares(teacher, pruned, torch.randn(20, 2, 5, 5), {}, ridge=1e-9)
    torch.testing.assert_close(pruned[0].weight, teacher[0].weight, rtol=0, atol=1e-3)


def test_a_scale_is_small_beside_the_others() -> None:
    norm = nn.BatchNorm2d(3, eps=0.0).eval()
    norm.weight.data = torch.tensor([1e-3, 2e-3, 1e-6])
    assert _scale(norm, torch.zeros(3)).isinf().tolist() == [False, False, True]
