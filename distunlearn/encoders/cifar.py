"""timm's ResNets with the stem for images of 32 pixels: one 3 x 3 convolution and no pooling.

Such encoders (of solo-learn, lightly, SimCLR's CIFAR recipes) cannot be had by arguments of `timm.create_model`, so
they are own modules here: `encoder.name=distunlearn.encoders.cifar:resnet`.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import nn


def resnet(name: str = "resnet18", in_chans: int = 3, **args: Any) -> nn.Module:
    """[n, C, S, S] -> [n, E]; name: of timm's ResNet, args: of `timm.create_model`."""
    model: Any = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **args)
    first = model.conv1
    model.conv1 = nn.Conv2d(in_chans, first.out_channels, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
