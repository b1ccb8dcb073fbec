"""torchvision and timm networks with a stem for small images: their code, with strides taken out."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import timm
import torchvision
from torch import nn
from torchvision.models import vgg

from dfkd.models.small import Factory, conv3x3, initialise


@dataclass(frozen=True)
class Stem:
    """Which network to take and what to change in it; the parts are module paths.

    Made for 224 pixels, all of these halve the side five times. With the edits listed in STEMS an image of 32
    pixels passes the first batch norm at 32 and the last at 4, the side customary for CIFAR.
    """

    builder: Callable[..., nn.Module]  # (name, num_classes=, **kwargs) -> network
    name: str
    conv: str  # the first convolution: made anew for the image's channels, 3x3, stride 1
    unstride: tuple[str, ...] = ()  # convolutions whose stride becomes 1
    unpool: tuple[str, ...] = ()  # pools that become the identity

    def __call__(self, classes: int, channels: int, **kwargs: Any) -> nn.Module:
        """Network from images [B, channels, H, W] to logits [B, classes]; kwargs go to the builder."""
        network = self.builder(self.name, num_classes=classes, **kwargs)
        width = cast(nn.Conv2d, network.get_submodule(self.conv)).out_channels
        network.set_submodule(self.conv, initialise(conv3x3(channels, width)))
        for path in self.unstride:
            cast(nn.Conv2d, network.get_submodule(path)).stride = (1, 1)
        for path in self.unpool:
            network.set_submodule(path, nn.Identity())
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # torchvision's mnasnet has 0.0003: statistics for millions of steps
        return network


def small_vgg(layout: str) -> Factory:
    """Factory of torchvision's VGG with batch norm and one linear layer after a global mean; 32 px end at 2.

    Built from the layers alone: the stock classifier would cost 120 M parameters to make and throw away.
    """

    def factory(classes: int, channels: int) -> nn.Module:
        features = vgg.make_layers(vgg.cfgs[layout], batch_norm=True)
        features[0] = nn.Conv2d(channels, 64, 3, padding=1)
        for module in features:
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = True  # five halvings leave nothing of 28 px otherwise
        parts: list[tuple[str, nn.Module]] = [
            ("features", features),
            ("avgpool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("classifier", nn.Linear(512, classes)),
        ]
        return initialise(nn.Sequential(OrderedDict(parts)))

    return factory


_tv, _timm = torchvision.models.get_model, timm.create_model

STEMS: dict[str, Factory] = {
    "vgg11": small_vgg("A"),
    "vgg13": small_vgg("B"),
    "vgg16": small_vgg("D"),
    "resnet18": Stem(_tv, "resnet18", "conv1", unpool=("maxpool",)),
    "resnet34": Stem(_tv, "resnet34", "conv1", unpool=("maxpool",)),
    "resnet50": Stem(_tv, "resnet50", "conv1", unpool=("maxpool",)),
    "seresnet18": Stem(_timm, "seresnet18", "conv1", unpool=("maxpool",)),
    "mobilenetv2": Stem(_tv, "mobilenet_v2", "features.0.0", unstride=("features.2.conv.1.0",)),
    "shufflenetv2": Stem(_tv, "shufflenet_v2_x1_0", "conv1.0", unpool=("maxpool",)),
    "densenet121": Stem(_tv, "densenet121", "features.conv0", unpool=("features.pool0",)),
    "regnet_x_400mf": Stem(
        _tv,
        "regnet_x_400mf",
        "stem.0",
        unstride=("trunk_output.block1.block1-0.proj.0", "trunk_output.block1.block1-0.f.b.0"),
    ),
    "mnasnet": Stem(_tv, "mnasnet1_0", "layers.0", unstride=("layers.8.0.layers.3",)),
}
