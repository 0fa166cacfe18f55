"""The tensors of a nested batch: found by their place, changed one by one, picked by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def tensors_of(data: Any, place: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dicts, lists and tuples by its place, as in `target` or `boxes/0`."""
    if isinstance(data, torch.Tensor):
        return {place: data}
    parts: list[tuple[Any, Any]] = []
    if isinstance(data, dict):
        parts = list(data.items())
    elif isinstance(data, list | tuple):
        parts = list(enumerate(data))
    found: dict[str, torch.Tensor] = {}
    for key, value in parts:
        found.update(tensors_of(value, f"{place}/{key}" if place else str(key)))
    return found


def changed(data: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nested data with every tensor replaced by what `change` makes of it."""
    if isinstance(data, torch.Tensor):
        return change(data)
    if isinstance(data, dict):
        return {key: changed(value, change) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(changed(value, change) for value in data)
    return data


def pick(data: Any, rows: Sequence[int], num: int) -> Any:
    """These samples of a batch of `num`: rows of every tensor, items of every list, that has `num` of them."""
    if isinstance(data, torch.Tensor):
        return data[list(rows)] if data.ndim > 0 and len(data) == num else data
    if isinstance(data, dict):
        return {key: pick(value, rows, num) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)([data[k] for k in rows] if len(data) == num else [pick(v, rows, num) for v in data])
    return data


def is_picture(tensor: torch.Tensor) -> bool:
    """Whether a collated tensor holds pixels: uint8 with at least three dimensions."""
    return tensor.dtype == torch.uint8 and tensor.ndim >= 3


def is_input(tensor: torch.Tensor) -> bool:
    """Whether a transformed tensor holds model input that a gradient can reach: floats with at least three dimensions."""
    return tensor.is_floating_point() and tensor.ndim >= 3


def outputs_of(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a prediction that have a row per sample and a column per output, as float32."""
    return [t.float() for t in tensors_of(outputs).values() if t.is_floating_point() and t.ndim >= 2]


def difference(first: Any, second: Any) -> float:
    """The largest difference between two predictions, as a share of the largest output; infinite where one is NaN."""
    largest = 0.0
    for a, b in zip(outputs_of(first), outputs_of(second), strict=True):
        apart = (a - b).abs().max() / a.abs().max().clamp(min=1e-12)
        largest = max(largest, float(torch.nan_to_num(apart, nan=torch.inf)))
    return largest


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
