"""What is cheap per batch runs on the device: colour, mixup, cutmix and normalisation, as a pure function of the batch
and its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from goodfit.core.random import derive_seed, permutation, stream, uniform
from goodfit.data.augment import colour_factors
from goodfit.runtime.images import Preprocessing

_MIX = stream("mix")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatchTransform:
    """Turns a collated batch of uint8 images into model input.

    The batch holds `image` (uint8, shape (N, 3, S, S)) and `target` (int64, shape (N,)). In training, mixup (Zhang et
    al. 2018) or cutmix (Yun et al. 2019) turns `target` into class shares (float32, shape (N, classes)). Both mix
    within a micro-batch, so accumulation changes which samples meet.
    """

    preprocessing: Preprocessing
    num_classes: int
    colour: float
    mixup: float
    cutmix: float
    seed: int
    channels_last: bool

    def train(
        self, batch: dict[str, Any], *, epoch: int, step: int, rank: int, micro: int, samples: npt.NDArray[np.int64]
    ) -> dict[str, Any]:
        """Colour, mix and normalise a training batch that is already on the device."""
        images = batch["image"].to(torch.float32)
        if self.colour > 0:
            factors = colour_factors(self.colour, seed=self.seed, epoch=epoch, samples=samples)
            images = _recolour(images, torch.from_numpy(factors).to(images.device))
        made = {**batch, "image": images}
        if self.mixup > 0 or self.cutmix > 0:
            self._mix(made, (self.seed, step, rank, micro))
        made["image"] = self.normalise(made["image"])
        return made

    def evaluate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalise a batch that is already on the device."""
        return {**batch, "image": self.normalise(batch["image"].to(torch.float32))}

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(x / 255 - mean) / std per channel; float32, shape unchanged."""
        mean = torch.tensor(self.preprocessing.mean, device=images.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.preprocessing.std, device=images.device).view(1, 3, 1, 1) * 255
        images = (images - mean) / std
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def _mix(self, batch: dict[str, Any], key: tuple[int, int, int, int]) -> None:
        images, targets = batch["image"], batch["target"]
        partner = torch.from_numpy(permutation(len(images), _MIX, *key)).to(images.device)
        coin, corner_x, corner_y = (float(v) for v in uniform(_MIX, *key, 1, np.arange(3)))
        use_cutmix = self.cutmix > 0 and (self.mixup == 0 or coin < 0.5)
        alpha = self.cutmix if use_cutmix else self.mixup
        share = float(np.random.default_rng(derive_seed(_MIX, *key, 2)).beta(alpha, alpha))
        if not use_cutmix:
            mixed = share * images + (1 - share) * images[partner]
        else:
            size = images.shape[-1]
            side = round(size * (1 - share) ** 0.5)
            left, top = round(corner_x * (size - side)), round(corner_y * (size - side))
            mixed = images.clone()
            mixed[:, :, top : top + side, left : left + side] = images[partner][
                :, :, top : top + side, left : left + side
            ]
            share = 1 - side * side / (size * size)
        one_hot = torch.nn.functional.one_hot(targets, self.num_classes).to(torch.float32)
        batch["image"] = mixed
        batch["target"] = share * one_hot + (1 - share) * one_hot[partner]


def _recolour(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast (around the picture's mean) and saturation (around its grey), clamped to [0, 255].

    Args:
        images: float32, shape (N, 3, H, W), values 0 to 255.
        factors: Brightness, contrast, saturation, shape (N, 3).
    """
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors.unbind(1))
    images = images * brightness
    luma = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
    grey = (images * luma).sum(dim=1, keepdim=True)
    images = grey + (images - grey) * saturation
    centre = grey.mean(dim=(2, 3), keepdim=True)
    return (centre + (images - centre) * contrast).clamp_(0, 255)
