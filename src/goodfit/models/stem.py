"""Networks for pictures of few pixels: a residual network whose stem reduces the picture less, `resnet18-stem1`.

The stem of a residual network of ImageNet reduces a picture four times before the first block (a convolution of stride 2, then
a max pool of stride 2), and the whole network 32 times: 32 pixels end as one. He et al. 2015 (section 4.2) therefore train
CIFAR-10 with a first convolution of stride 1 and no pool. `NAME-stem1` is that; `NAME-stem2` keeps the stride of the convolution
and has no pool. No weight changes its shape, so pretrained weights of NAME fit, and so do the layers' names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.core.errors import RequestError

STEMS = {"stem1": 1, "stem2": 2}  # suffix of a name, and the stride of the stem


@dataclass(frozen=True, slots=True)
class ModelName:
    """The parts of a model's name, as in `resnet18-stem1.a1_in1k`.

    Attributes:
        architecture: timm's name, `resnet18`.
        tag: Of the pretrained weights, `a1_in1k`; empty for timm's default.
        stem: Stride of the stem; 0 leaves it as it is.
    """

    architecture: str
    tag: str = ""
    stem: int = 0

    @property
    def in_timm(self) -> str:
        """The name that timm knows."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture

    @property
    def text(self) -> str:
        """The whole name, as `model=` takes it."""
        stem = f"-stem{self.stem}" if self.stem else ""
        return f"{self.architecture}{stem}" + (f".{self.tag}" if self.tag else "")


def split_name(name: str) -> ModelName:
    """Take a name apart.

    Raises:
        RequestError: what follows the hyphen is no stem.
    """
    base, _, tag = name.partition(".")
    architecture, hyphen, suffix = base.partition("-")
    if hyphen and suffix not in STEMS:
        raise RequestError(f"There is no model called {name}: -{suffix} is not {' or '.join(f'-{s}' for s in STEMS)}.",
                           where="model=", next=f"try {architecture}, or {architecture}-stem1 for small pictures")  # fmt: skip
    return ModelName(architecture, tag, STEMS.get(suffix, 0))


def set_stem(network: nn.Module, stride: int) -> None:
    """Give a residual network of timm a stem of stride 1 or 2 in place of 4.

    Raises:
        RequestError: it is no network with a strided first convolution and a max pool after it.
    """
    first: Any = getattr(network, "conv1", None)
    if isinstance(first, nn.Sequential):
        first = first[0]
    pool = getattr(network, "maxpool", None)
    if not isinstance(first, nn.Conv2d) or not isinstance(pool, nn.MaxPool2d) or first.stride != (2, 2):
        raise RequestError(f"{type(network).__name__} has no stem of a residual network, so -stem{stride} cannot be used.",
                           where="model=", next="leave the -stem out, or use a residual network, as resnet18-stem1")  # fmt: skip
    first.stride = (stride, stride)
    network.maxpool = nn.Identity()
