"""What a network costs, against counts by hand."""

import copy

import pytest
import timm
import torch
import torchvision
from networks_fixture import images, named
from torch import nn

from dfkd.classifier import Classifier
from dfkd.compress.cost import cost
from dfkd.compress.quantize import quantize


def by_hand() -> nn.Module:
    """conv 3x3, depthwise 3x3 at stride 2, 1x1 without bias, linear, for images [1, 3, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


WEIGHTS = [4 * 3 * 9, 4 * 9, 6 * 4, 5 * 6]
REST = 4 + 2 * 4 + 4 + 5  # biases, the batch norm's scale and shift
MACS = 8 * 8 * 4 * 3 * 9 + 4 * 4 * 4 * 9 + 4 * 4 * 6 * 4 + 6 * 5


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_networks_cost_is_counted_as_by_hand(wrapped: bool) -> None:
    network = by_hand().train()
    model = Classifier(network, mean=[0.5] * 3, std=[0.5] * 3) if wrapped else network
    before = copy.deepcopy(network.state_dict())
    found = cost(model, images(1, 3, 8, 8))
    assert found == {
        "parameters": sum(WEIGHTS) + REST,
        "macs": MACS,
        "sparsity": 0.0,
        "bytes": 4 * (sum(WEIGHTS) + REST + 2 * 4),  # with the running statistics
    }
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_network_without_layers_costs_nothing() -> None:
    assert cost(nn.Sequential(nn.ReLU(), nn.Flatten()), images(1, 3, 8, 8))["macs"] == 0


class Windows(nn.Module):
    """A linear layer on windows of a map, which are a view of it, as in Twins."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        windows = x.reshape(len(x), x.shape[1] // 4, 4, x.shape[2] // 4, 4, 8).transpose(2, 3)
        return self.linear(windows).mean((1, 2, 3, 4))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_linear_layer_of_views_costs_what_one_of_copies_does(wrapped: bool) -> None:
    model = Classifier(Windows(), mean=[0.5] * 3, std=[0.5] * 3) if wrapped else Windows()
    assert cost(model, images(1, 3, 16, 16))["macs"] == 16 * 16 * (3 * 8 + 8 * 6)
    assert cost(nn.Linear(4, 3), images(1, 4))["macs"] == 12


def test_torchs_own_attention_costs_what_its_linear_layers_do() -> None:
    vit = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10).eval()
    embedding, block = 16 * 64 * 3 * 8 * 8, 17 * (64 * 3 * 64 + 64 * 64 + 2 * 64 * 128)  # 16 patches, 17 tokens
    assert torch.backends.mha.get_fastpath_enabled()
    assert cost(vit, images(1, 3, 32, 32))["macs"] == embedding + 2 * block + 64 * 10
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_no_layer(fused: bool) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
    vit.blocks[0].attn.fused_attn = fused
    layers = [m.weight.numel() for m in vit.modules() if isinstance(m, nn.Conv2d | nn.Linear)]  # on 4 patches, 5 tokens
    assert cost(vit, images(1, 3, 32, 32))["macs"] == 4 * layers[0] + 5 * sum(layers[1:-1]) + layers[-1]


def test_zeros_are_a_percentage_of_all_weights() -> None:
    network = by_hand()
    with torch.no_grad():
        network[0].weight[:2] = 0
        network[7].weight[0] = 0
        network[1].weight.zero_()  # a batch norm's do not count
    found = cost(network, images(1, 3, 8, 8))
    assert found["sparsity"] == pytest.approx(100 * (2 * 27 + 6) / sum(WEIGHTS))
    assert found["macs"] == MACS


def test_a_quantised_weight_takes_its_bits() -> None:
    stream = [images(8, 3, 8, 8)]
    given = Classifier(by_hand().eval(), mean=[0.5] * 3, std=[0.5] * 3)
    options = {"method": "nearest", "images": 8, "overrides": {"3": [2, 4], "4": [5, 8]}, "ignore": ["7"]}
    done = quantize(given, stream, (4, 4), ends=(8, 8), **options)  # type: ignore[arg-type]
    found = cost(done.model, images(1, 3, 8, 8))
    biases, scales = 4 + 4 + 5, 4 + 4 + 6
    tensors = 4  # scales of: the input, the depthwise layer's input, the 1x1's, what is averaged
    weights = (8 * WEIGHTS[0] + 2 * WEIGHTS[1] + 5 * WEIGHTS[2] + 32 * WEIGHTS[3]) / 8
    assert found["bytes"] == round(weights + 4 * (biases + scales + tensors))
    assert found["parameters"] == sum(WEIGHTS) + biases  # the batch norm is folded
    assert found["macs"] == MACS


def test_zeros_of_a_quantised_network_are_those_of_its_codes() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[2].weight.copy_(torch.tensor([[1.0] * 8, [-1.0] * 8, [0.01] * 8, [0.0] * 8]))
    done = quantize(network, [images(8, 1, 2, 2)], 2, method="nearest", images=8, ends=(2, 2))
    # per output, 0.01 has a step of its own; a row of zeros is all that is zero
    assert cost(done.model, images(1, 1, 2, 2))["sparsity"] == pytest.approx(100 * 8 / 34)
    whole = quantize(network, [images(8, 1, 2, 2)], 2, method="train", images=8, ends=(2, 2), steps=0)
    assert cost(whole.model, images(1, 1, 2, 2))["sparsity"] == pytest.approx(100 * 16 / 34)


def test_resnet20_has_the_cost_of_the_paper() -> None:
    found = cost(named("dfkd:resnet20", 3, 10), images(1, 3, 32, 32))
    # He et al. 2016: 0.27 M parameters; the option-A shortcuts have none
    convs = [3 * 16 * 9, *[16 * 16 * 9] * 6, 16 * 32 * 9, *[32 * 32 * 9] * 5, 32 * 64 * 9, *[64 * 64 * 9] * 5]
    sides = [32] * 7 + [16] * 6 + [8] * 6
    assert found["parameters"] == sum(convs) + 2 * (7 * 16 + 6 * 32 + 6 * 64) + 64 * 10 + 10
    assert found["macs"] == sum(weights * side**2 for weights, side in zip(convs, sides)) + 640
