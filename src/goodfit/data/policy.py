"""Policy-type augmentation, TrivialAugment and RandAugment: which operations a sample gets is a pure function of its key.

Operations and magnitudes are those of torchvision's TrivialAugmentWide and RandAugment, applied by Pillow to the square
input (four times faster than on tensors). What moves pixels is an affine matrix, so that boxes and masks can move along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from goodfit.core.random import stream, uniform

_POLICY = stream("policy")
POLICIES = ("off", "trivial", "rand")
RAND_OPERATIONS = 2  # RandAugment's N (Cubuk et al. 2020)
RAND_MAGNITUDE = 9 / 30  # and M, as a share of the range
FILL = (124, 116, 104)  # what moves in from outside: the mean of ImageNet

_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_COLOUR = ("brightness", "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize")
_OPERATIONS = ("identity", *_GEOMETRIC, *_COLOUR)
_SIGNED = (*_GEOMETRIC, "brightness", "color", "contrast", "sharpness")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation and its signed magnitude, -1 to 1 as a share of the operation's range."""

    name: str
    magnitude: float
    wide: bool  # TrivialAugment's ranges, wider than RandAugment's

    def matrix(self, size: int) -> npt.NDArray[np.float64]:
        """Where a point of the input goes, homogeneous, shape (3, 3); the identity for what only recolours."""
        m = self.magnitude
        made = np.eye(3)
        centre = size / 2
        if self.name == "shear_x":
            made[0, 1] = m * (0.99 if self.wide else 0.3)
        elif self.name == "shear_y":
            made[1, 0] = m * (0.99 if self.wide else 0.3)
        elif self.name in ("translate_x", "translate_y"):
            reach = 32 * size / 224 if self.wide else 150 / 331 * size
            made["xy".index(self.name[-1]), 2] = m * reach
            return made
        elif self.name == "rotate":
            angle = math.radians(m * (135 if self.wide else 30))
            made[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        made[:2, 2] = centre - made[:2, :2] @ (centre, centre)  # around the centre
        return made

    def __call__(self, image: Image.Image) -> Image.Image:
        """Apply to a square RGB image."""
        if self.name in _GEOMETRIC:
            back = np.linalg.inv(self.matrix(image.width))
            return image.transform(image.size, Image.Transform.AFFINE, tuple(back[:2].ravel()),
                                   Image.Resampling.BILINEAR, fillcolor=FILL)  # fmt: skip
        return _RECOLOUR[self.name](image, self.magnitude * (0.99 if self.wide else 0.9))


def _posterize(image: Image.Image, m: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(abs(m) * 6 / 0.99))


_RECOLOUR: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    "color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    "posterize": _posterize,
    "solarize": lambda image, m: ImageOps.solarize(image, int(255 * (1 - abs(m)))),
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}


def draw_operations(policy: str, *, seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> list[list[Operation]]:
    """The operations of each sample, in order.

    "trivial": one operation of any strength (TrivialAugmentWide, Müller & Hutter 2021). "rand": two of strength 9 of 30
    (RandAugment, Cubuk et al. 2020).
    """
    if policy == "off":
        return [[] for _ in samples]
    draws = uniform(_POLICY, seed, epoch, samples[:, None], np.arange(3 * RAND_OPERATIONS))
    made = []
    for row in draws.tolist():
        count = 1 if policy == "trivial" else RAND_OPERATIONS
        chosen = []
        for which, strength, sign in zip(row[0::3][:count], row[1::3], row[2::3], strict=False):
            name = _OPERATIONS[int(which * len(_OPERATIONS))]
            magnitude = strength if policy == "trivial" else RAND_MAGNITUDE
            signed = -magnitude if sign < 0.5 and name in _SIGNED else magnitude
            chosen.append(Operation(name, signed, policy == "trivial"))
        made.append(chosen)
    return made


def apply_operations(operations: list[Operation], pixels: npt.NDArray[np.uint8]) -> None:
    """Apply operations to one input in place.

    Args:
        pixels: uint8, shape (size, size, 3).
    """
    if not operations:
        return
    image = Image.fromarray(pixels)
    for operation in operations:
        image = operation(image)
    pixels[:] = np.asarray(image)


def move_points(operations: list[Operation], points: npt.NDArray[np.floating], size: int) -> npt.NDArray[np.float64]:
    """Points (x, y) of the input as they lie after the operations. Shape: (P, 2)."""
    matrix = np.eye(3)
    for operation in operations:
        matrix = operation.matrix(size) @ matrix
    return np.asarray(points @ matrix[:2, :2].T + matrix[:2, 2])
