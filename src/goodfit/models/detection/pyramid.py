"""A timm backbone under torchvision's feature pyramid (Lin et al. 2017)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from goodfit.core.errors import RequestError
from goodfit.models.builder import create

STRIDES = (8, 16, 32)  # of the backbone's maps that the pyramid stands on


class Pyramid(nn.Module):
    """Maps of one width at strides 8, 16 and 32, and 64 and 128 where more levels are asked for.

    Args:
        backbone: A timm name; its head is left away.
        channels: Of every map.
        num_levels: 3, 4 or 5.

    Raises:
        RequestError: this network does not give maps at these strides.
    """

    def __init__(self, backbone: str, *, channels: int, num_levels: int, **arguments: Any) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body: Any = create(backbone, num_classes=0, **arguments)
        self.indices, widths = _maps(self.body, backbone)
        self.fpn = FeaturePyramidNetwork(list(widths), channels, extra_blocks=None)
        self.more = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(num_levels - len(STRIDES)))
        for convolution in self.more:
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)
        self.strides = tuple(STRIDES[0] * 2**level for level in range(num_levels))

    def prune(self) -> None:
        """Leave away what the maps do not need, once the pretrained weights are loaded."""
        self.body.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Maps of shape (N, channels, height / stride, width / stride) from images (N, 3, height, width)."""
        maps = self.body.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        levels = list(self.fpn(OrderedDict((str(k), m) for k, m in enumerate(maps))).values())
        for number, convolution in enumerate(self.more):
            levels.append(convolution(torch.relu(levels[-1]) if number else levels[-1]))
        return levels


def _maps(body: Any, name: str) -> tuple[list[int], tuple[int, ...]]:
    """Which of the backbone's maps have the strides of the pyramid, and their widths."""
    levels = [dict(level) for level in getattr(body, "feature_info", None) or ()]
    by_stride = {int(level["reduction"]): (number, int(level["num_chs"])) for number, level in enumerate(levels)}
    if not hasattr(body, "forward_intermediates") or any(stride not in by_stride for stride in STRIDES):
        raise RequestError(f"{name} has no maps at strides 8, 16 and 32, which a feature pyramid stands on.", where="model=",
                           next="use a convolutional backbone, as fcos/mobilenetv2_100 or fcos/resnet18")  # fmt: skip
    return [by_stride[s][0] for s in STRIDES], tuple(by_stride[s][1] for s in STRIDES)
