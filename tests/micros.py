"""What a step takes, in its plainest form: samples that fit at once, and a transform that changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Micro:
    """Samples (their rows) and their tensors."""

    samples: np.ndarray
    data: dict[str, torch.Tensor]


class Identity:
    """A batch as it is, in training and evaluation."""

    def train(self, batch: Any, **_: Any) -> Any:
        return batch

    def evaluate(self, batch: Any) -> Any:
        return batch
