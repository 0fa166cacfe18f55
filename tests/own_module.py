"""A module and a dataset as a user would have them, all random: for tests, and as a program that can be killed.

As a program: `python own_module.py PROJECT SECONDS_A_SAMPLE`.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np
import torch
from torch import nn

import goodfit

OPTIONS = {"epochs": 3, "batch": 12, "accumulate": 3, "rehearse": False, "seed": 4, "lr": 0.01}


class Vectors:
    """Pairs of vectors to add and multiply, noisy at every look; slow where it is wanted."""

    def __init__(self, num: int, seconds: float = 0.0, seed: int = 0) -> None:
        values = np.random.default_rng(seed)
        self.values = values.standard_normal((num, 2, 4)).astype(np.float32)
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int):
        time.sleep(self.seconds)
        noise = 0.05 * (torch.rand(4) + random.random()) + 0.05 * torch.from_numpy(np.random.rand(4)).float()
        one, other = torch.from_numpy(self.values[row])
        return {"one": one + noise, "other": other}, int((one * other).sum() > 0)


class Net(nn.Module):
    """Two vectors (N, 4) to logits (N, 2), with dropout and batch norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, width), nn.BatchNorm1d(width)
        self.last, self.drop = nn.Linear(width, 2), nn.Dropout(0.1)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        made = torch.cat((one, other, one * other), dim=1)
        return self.last(self.drop(torch.relu(self.norm(self.first(made)))))


def train(project: str, seconds: float = 0.0, *, start: int = 0, **asked) -> goodfit.Run:
    more = asked if "resume" in asked else {"project": project} | OPTIONS | asked
    torch.manual_seed(start)  # of the weights that are handed over
    return goodfit.fit(Net(), Vectors(120, seconds), Vectors(40, seed=1), loss=nn.CrossEntropyLoss(), metrics=["accuracy"],
                       **more)  # fmt: skip


if __name__ == "__main__":
    try:
        train(sys.argv[1], float(sys.argv[2]), workers=int(sys.argv[3]))
    except goodfit.Stopped as stopped:
        print(stopped)
        sys.exit(stopped.exit_code)
