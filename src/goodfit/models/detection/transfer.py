"""Going on from another detector: all of its weights, and of the layers that tell classes apart the rows of those known by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from goodfit.core.errors import DataError, StorageError, WeightsError
from goodfit.core.safeio import read_json
from goodfit.models.weights import CARD, RUN_PLAN, WEIGHTS, WeightReport, find_weights, match_labels
from goodfit.runtime.letterbox import Letterbox


@dataclass(frozen=True, slots=True)
class ClassLayer:
    """A layer with rows for every class: `outer` blocks, each of background (if `background`), the classes and a row for no class
    (if `padding`), `inner` rows each."""

    name: str
    outer: int = 1
    background: bool = False
    inner: int = 1
    padding: bool = False

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight or bias as (outer, classes, inner, ...), a view."""
        return tensor.unflatten(0, (self.outer, -1, self.inner))


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorCard:
    """What the card of a detector's bundle says about its weights."""

    file: Path
    model: str
    labels: tuple[str, ...]
    letterbox: Letterbox
    licence: str
    detector: dict[str, Any]  # its architecture, as a plan has it


def read_detector_card(pretrained: str) -> DetectorCard | None:
    """The card of the detector whose run, bundle or weight file this is; None if it is something else.

    Raises:
        WeightsError: there is no such file or folder, or its card is damaged.
    """
    file = None if pretrained in ("true", "false") else find_weights(pretrained)
    if file is None or file.name != WEIGHTS or not file.with_name(CARD).is_file():
        return None
    try:
        card = read_json(file.with_name(CARD))
        if "/" not in str(card.get("model", "")):
            return None
        return DetectorCard(file=file, model=str(card["model"]), labels=tuple(map(str, card["labels"])),
                            letterbox=Letterbox.from_dict(card["preprocessing"]), licence=str(card.get("licence", "not stated")),
                            detector=dict(read_json(file.with_name(RUN_PLAN))["decisions"]["detector"]["value"]))  # fmt: skip
    except (StorageError, DataError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"The card of the bundle cannot be used: {error}", where=str(file.with_name(CARD))
        ) from error


def load_detector(network: nn.Module, card: DetectorCard, class_names: Sequence[str]) -> WeightReport:
    """Load a bundle's detector into one of the same family, backbone and shape.

    Raises:
        WeightsError: a tensor is missing or has another shape.
    """
    from safetensors.torch import load_file

    return take_tensors(network, load_file(str(card.file)), card.labels, class_names, where=str(card.file),
                        next=f"use model={card.model} with the same levels and widths, or the weights of a backbone alone")  # fmt: skip


def take_tensors(
    network: nn.Module, found: dict[str, torch.Tensor], labels: Sequence[str], class_names: Sequence[str], *, where: str, next: str
) -> WeightReport:  # fmt: skip
    """Take another detector's tensors, of the layers that tell classes apart the rows of those known by name.

    Args:
        labels: The classes of these tensors, in their order.
        where, next: For the error.

    Raises:
        WeightsError: a tensor is missing or has another shape.
    """
    own = network.state_dict()
    layers: dict[str, ClassLayer] = {}
    made: Any = network
    for layer in made.class_layers:
        layers |= {name: layer for part in ("weight", "bias") if (name := f"{layer.name}.{part}") in own}
    problems = [name for name, tensor in own.items()
                if name not in found or (name not in layers and found[name].shape != tensor.shape)]  # fmt: skip
    if problems:
        raise WeightsError(
            f"{len(problems)} tensors of the detector do not fit (first: {problems[0]}).", where=where, next=next
        )
    matched = match_labels(labels, class_names)
    network.load_state_dict({k: v for k, v in found.items() if k in own and k not in layers}, strict=False)
    for name, layer in layers.items():
        mine, theirs, first = layer.rows(own[name]), layer.rows(found[name]), int(layer.background)
        if layer.background:
            mine[:, 0] = theirs[:, 0]
        if layer.padding:
            mine[:, -1] = theirs[:, -1]
        for number, other in matched.items():
            mine[:, number + first] = theirs[:, other + first]
    kept = [class_names[number] for number in matched]
    new = [name for number, name in enumerate(class_names) if number not in matched]
    note = f"the detector keeps {len(kept):,} of {len(class_names):,} classes by name" + (
        f"; new: {', '.join(new[:5])}" if new else ""
    )
    return WeightReport(loaded=len(own) - len(layers), initialised=tuple(layers) if new else (), unused=tuple(k for k in found if k not in own),
                        known=tuple(kept), head=note)  # fmt: skip
