"""How many processes train together, and which one this is: a small value, one process by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together. With one process every exchange is the identity."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process raised the flag; all agree on the answer."""
        if self.size == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag))))

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """The plain values of all processes, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values
