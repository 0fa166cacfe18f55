"""Nested samples: everything in them by its place, and one batch of a list of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from goodfit.core.errors import DataError


def leaves(data: Any, place: str = "") -> dict[str, Any]:
    """Everything in nested dicts, lists and tuples by its place, as in `0/image` or `1`."""
    parts: list[tuple[Any, Any]] | None = None
    if isinstance(data, Mapping):
        parts = list(data.items())
    elif isinstance(data, list | tuple):
        parts = list(enumerate(data))
    if parts is None:
        return {place or "data": data}
    found: dict[str, Any] = {}
    for key, value in parts:
        found.update(leaves(value, f"{place}/{key}" if place else str(key)))
    return found


def collate_samples(samples: list[Any], place: str = "") -> Any:
    """One batch of a list of samples, nested as they are: tensors, arrays and numbers are stacked, texts stay lists.

    As torch.utils.data.default_collate, but Python's floats become float32, as `torch.tensor` makes them.

    Raises:
        DataError: samples differ in shape or structure, or hold what cannot be stacked.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        if any(not isinstance(s, Mapping) or s.keys() != first.keys() for s in samples):
            raise DataError(
                f"Samples differ in their keys at `{place or 'data'}`.", next="give every sample the same keys"
            )
        return {key: collate_samples([s[key] for s in samples], f"{place}/{key}".strip("/")) for key in first}
    if isinstance(first, list | tuple):
        if any(len(s) != len(first) for s in samples):
            raise DataError(f"Samples differ in length at `{place or 'data'}`.",
                            next="pad them in the dataset, or pass collate=")  # fmt: skip
        return tuple(collate_samples(list(parts), f"{place}/{number}".strip("/"))
                     for number, parts in enumerate(zip(*samples, strict=True)))  # fmt: skip
    if isinstance(first, str | bytes):
        return samples
    if isinstance(first, bool | int | float | np.generic):
        return torch.tensor(samples) if not isinstance(first, np.generic) else torch.as_tensor(np.stack(samples))
    if not isinstance(first, torch.Tensor | np.ndarray):
        raise DataError(f"Samples hold a {type(first).__name__} at `{place or 'data'}`, which cannot become a tensor.",
                        next="return tensors, arrays or numbers from the dataset, or pass collate=")  # fmt: skip
    tensors = [torch.as_tensor(s) for s in samples]
    odd = next((t for t in tensors if t.shape != tensors[0].shape), None)
    if odd is not None:
        raise DataError(f"Samples differ in shape at `{place or 'data'}`: {tuple(tensors[0].shape)} and {tuple(odd.shape)}.",
                        next="pad or resize them in the dataset, or pass collate=")  # fmt: skip
    return torch.stack(tensors)
