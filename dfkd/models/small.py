"""Networks for images of 8 to 64 pixels a side: CIFAR ResNets, WideResNets, three tiny families for a CPU."""

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Factory = Callable[..., nn.Module]  # (classes, channels, **kwargs) -> network


def initialise(network: nn.Module) -> nn.Module:
    """He initialisation by fan-out for convolutions, 1 and 0 for batch norm; linear layers keep their own."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    return network


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the side at stride 1; no bias, a batch norm follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def whole_above_zero(**values: int) -> None:
    """Raise ValueError naming the first value that is not a whole number above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, not {value!r}")


class PadShortcut(nn.Module):
    """Option A: every second pixel, new channels zero, half before, half after; He et al. 2016, section 4.2.

    [B, C, H, W] -> [B, C + added, ceil(H / stride), ceil(W / stride)]
    """

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added, self.stride = added, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn, plus shortcut, then relu; [B, C, H, W] -> [B, C', H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers, images [B, C, H, W] to logits [B, K]; He et al. 2016, section 4.2.

    State-dict keys are those of akamaster/pytorch_resnet_cifar10, so that its checkpoints load strictly.
    """

    def __init__(self, depth: int, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(width, width, blocks)
        self.layer2 = self._stage(width, 2 * width, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        added = out_channels - in_channels
        shortcut = PadShortcut(added, stride=2) if added else nn.Identity()
        first = BasicBlock(in_channels, out_channels, 2 if added else 1, shortcut)
        rest = [BasicBlock(out_channels, out_channels, 1, nn.Identity()) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


class WideBlock(nn.Module):
    """Pre-activation block bn-relu-conv-bn-relu-conv plus shortcut; [B, C, H, W] -> [B, C', H/s, W/s].

    Where the width changes, the 1x1 shortcut starts from the activated input, as in the authors' code.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return self.conv2(self.relu2(self.bn2(self.conv1(activated)))) + shortcut


class WideStage(nn.Module):
    """Blocks in a row under the name `layer`; [B, C, H, W] -> [B, C', H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(in_channels, out_channels, stride)
        self.layer = nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-widen, images [B, C, H, W] to logits [B, K]; Zagoruyko and Komodakis 2016, table 1.

    State-dict keys are those of xternalz/WideResNet-pytorch, which data-free papers' checkpoints follow.
    """

    def __init__(self, depth: int, widen: int, classes: int, channels: int) -> None:
        super().__init__()
        blocks, width = (depth - 4) // 6, 16 * widen
        self.conv1 = conv3x3(channels, 16)
        self.block1 = WideStage(16, width, blocks, 1)
        self.block2 = WideStage(width, 2 * width, blocks, 2)
        self.block3 = WideStage(2 * width, 4 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.pool(self.relu(self.bn1(x))).flatten(1))


def conv_bn(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm, to be unpacked into a Sequential; the side shrinks by `stride` alone."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """`conv_bn` and an activation."""
    return [*conv_bn(in_channels, out_channels, kernel, stride, groups), nn.ReLU(inplace=True)]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection, plus the input where shapes allow.

    [B, C, H, W] -> [B, C', H/stride, W/stride]; Sandler et al. 2018, section 3.3, with ReLU for ReLU6.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.body = nn.Sequential(
            *conv_bn_relu(in_channels, hidden, kernel=1),
            *conv_bn_relu(hidden, hidden, stride=stride, groups=hidden),
            *conv_bn(hidden, out_channels, kernel=1),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def classifier(features: list[nn.Module], in_features: int, classes: int) -> nn.Module:
    """Features, global mean and a linear layer under those names: images [B, C, H, W] to logits [B, K]."""
    parts: list[tuple[str, nn.Module]] = [
        ("features", nn.Sequential(*features)),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("linear", nn.Linear(in_features, classes)),
    ]
    return initialise(nn.Sequential(OrderedDict(parts)))


def tiny_plain(classes: int, channels: int, width: int = 16, depth: int = 2) -> nn.Module:
    """VGG in small: three stages of `depth` conv-bn-relu, pooled in between; channels double per stage."""
    whole_above_zero(width=width, depth=depth)
    layers: list[nn.Module] = []
    in_channels = channels
    for stage in range(3):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(depth):
            layers += conv_bn_relu(in_channels, width << stage)
            in_channels = width << stage
    return classifier(layers, in_channels, classes)


def tiny_residual(classes: int, channels: int, width: int = 16, depth: int = 1) -> nn.Module:
    """ResNet in small: a stem, three stages of `depth` basic blocks, a projection at each new width."""
    whole_above_zero(width=width, depth=depth)
    layers: list[nn.Module] = conv_bn_relu(channels, width)
    in_channels = width
    for stage in range(3):
        out_channels, stride = width << stage, 2 if stage else 1
        for block in range(depth):
            shortcut: nn.Module = nn.Identity()
            if stage and block == 0:
                shortcut = nn.Sequential(*conv_bn(in_channels, out_channels, kernel=1, stride=stride))
            layers.append(BasicBlock(in_channels, out_channels, stride if block == 0 else 1, shortcut))
            in_channels = out_channels
    return classifier(layers, in_channels, classes)


def tiny_inverted(classes: int, channels: int, width: int = 16, depth: int = 2, expansion: int = 3) -> nn.Module:
    """MobileNetV2 in small: a stem, three stages of `depth` inverted residuals, a 1x1 convolution."""
    whole_above_zero(width=width, depth=depth, expansion=expansion)
    layers: list[nn.Module] = conv_bn_relu(channels, width)
    in_channels = width
    for stage in range(3):
        for block in range(depth):
            stride = 2 if stage and block == 0 else 1
            layers.append(InvertedResidual(in_channels, width << stage, stride, expansion))
            in_channels = width << stage
    layers += conv_bn_relu(in_channels, width << 3, kernel=1)
    return classifier(layers, width << 3, classes)


def _cifar_resnet(depth: int) -> Factory:
    def factory(classes: int, channels: int, width: int = 16) -> nn.Module:
        whole_above_zero(width=width)
        return initialise(CifarResNet(depth, classes, channels, width))

    return factory


def _wide_resnet(depth: int, widen: int) -> Factory:
    def factory(classes: int, channels: int) -> nn.Module:
        return initialise(WideResNet(depth, widen, classes, channels))

    return factory


SMALL: dict[str, Factory] = {
    "resnet20": _cifar_resnet(20),
    "resnet32": _cifar_resnet(32),
    "resnet44": _cifar_resnet(44),
    "resnet56": _cifar_resnet(56),
    "resnet110": _cifar_resnet(110),
    "wrn_16_1": _wide_resnet(16, 1),
    "wrn_16_2": _wide_resnet(16, 2),
    "wrn_40_1": _wide_resnet(40, 1),
    "wrn_40_2": _wide_resnet(40, 2),
    "tiny_plain": tiny_plain,
    "tiny_residual": tiny_residual,
    "tiny_inverted": tiny_inverted,
}
