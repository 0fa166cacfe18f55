"""Pretrained weights: where they come from, and loading them with a strict report."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from goodfit.config.facts import ModelFacts
from goodfit.config.plan import Plan
from goodfit.core.errors import DataError, StorageError, WeightsError
from goodfit.core.safeio import read_json
from goodfit.models.groups import head_prefixes
from goodfit.runtime.images import Preprocessing

MAX_NAMED = 5  # tensors or classes named in a report
WEIGHTS, CARD, RUN_PLAN, BUNDLE = "model.safetensors", "bundle.json", "plan.json", "bundle"  # as a run writes them
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """What loading did with every tensor of the file and of the network.

    Attributes:
        loaded: Tensors that were taken whole.
        initialised: Names of those of the network that are new, in whole or, of the head, in part.
        unused: Names of those that were left in the file.
        known: Classes whose rows of the head were taken, by their names.
        head: What became of the head, in words.
    """

    loaded: int
    initialised: tuple[str, ...]
    unused: tuple[str, ...]
    known: tuple[str, ...]
    head: str

    def describe(self) -> str:
        """One line for the terminal and the report."""
        text = f"{self.loaded} tensors loaded; {self.head}"
        if self.initialised:
            text += f"; new: {_some(self.initialised)}"
        if self.unused:
            text += f"; left in the file: {_some(self.unused)}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What the card of a bundle says about its weights."""

    model: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    licence: str


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def find_weights(pretrained: str) -> Path | None:
    """The weight file that `pretrained` points to: itself, or that of a bundle or of a run whose folder it is.

    Returns:
        None for "true", "false" and names of weights.

    Raises:
        WeightsError: there is no such file or folder, it may run code when it is read, or it is no bundle.
    """
    path = Path(pretrained)
    if path.is_dir():
        return _bundle_folder(path.resolve()) / WEIGHTS  # a run must find it again from another folder
    if pretrained.endswith(SUFFIXES) or path.is_file():
        _check_file(path)
        return path.resolve()
    if "/" in pretrained.removeprefix("timm/") or "\\" in pretrained:
        raise WeightsError("There is no such weight file, bundle or run.", where=pretrained,
                           next="check pretrained=, the folder of a run or of its bundle")  # fmt: skip
    return None


def _bundle_folder(path: Path) -> Path:
    if (path / CARD).is_file() and (path / WEIGHTS).is_file():
        return path
    if (path / BUNDLE / CARD).is_file() and (path / BUNDLE / WEIGHTS).is_file():
        return path / BUNDLE
    if (path / RUN_PLAN).is_file():
        raise WeightsError("This run has no bundle: it has not finished.", where=str(path),
                           next=f"finish it first: goodfit resume {path}")  # fmt: skip
    raise WeightsError(f"This folder is neither a bundle nor a run: a bundle has {CARD} and {WEIGHTS}.", where=str(path),
                       next="check pretrained=, the folder of a run or of its bundle")  # fmt: skip


def _check_file(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path.suffix or 'This'} files can run code when they are read, so only .safetensors files are.",
            where=str(path),
            next="convert it where it comes from: safetensors.torch.save_file(model.state_dict(), 'FILE.safetensors')",
        )
    if not path.is_file():
        raise WeightsError("There is no such weight file.", where=str(path), next="check pretrained=FILE")
    read_shapes(path)


def read_bundle(path: Path) -> Bundle | None:
    """The card beside a bundle's weight file; None beside any other.

    Raises:
        WeightsError: the card is damaged.
    """
    card = path.with_name(CARD)
    if path.name != WEIGHTS or not card.is_file():
        return None
    try:
        found = read_json(card)
        labels = tuple(found["labels"])
        if not all(isinstance(text, str) for text in (found["model"], *labels)):
            raise TypeError("a name is no text")
        return Bundle(model=found["model"], labels=labels, licence=str(found.get("licence", "not stated")),
                      preprocessing=Preprocessing.from_dict(found["preprocessing"]))  # fmt: skip
    except (StorageError, DataError) as error:
        raise WeightsError(f"The card of the bundle cannot be used: {error.message}", where=str(card)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"The card of the bundle is incomplete: {error}.", where=str(card)) from error


def with_source(facts: ModelFacts, path: Path, bundle: Bundle | None) -> ModelFacts:
    """The facts of a model with what its weight file says: the classes of its head, and how a bundle's pictures are made."""
    facts = replace(facts, labels=read_labels(path))
    if bundle is None:
        return facts
    made = bundle.preprocessing
    return replace(facts, licence=bundle.licence, bundle_imgsz=made.size, crop_share=made.size / made.resize,
                   interpolation=made.interpolation, mean=made.mean, std=made.std)  # fmt: skip


def read_labels(path: Path) -> tuple[str, ...]:
    """The classes of a weight file's head, in its order: from the bundle's card beside it, or from the file's own metadata,
    where `labels` is a JSON list of names; empty where neither says.

    Raises:
        WeightsError: the card is damaged.
    """
    from safetensors import SafetensorError, safe_open

    bundle = read_bundle(path)
    if bundle is not None:
        return bundle.labels
    try:
        with safe_open(str(path), framework="np") as handle:
            found = json.loads((handle.metadata() or {}).get("labels", "[]"))
    except (SafetensorError, OSError, ValueError):
        return ()
    return tuple(found) if isinstance(found, list) and all(isinstance(name, str) for name in found) else ()


def match_labels(known: Sequence[str], class_names: Sequence[str]) -> dict[int, int]:
    """Which of the known classes each class of the data is, by number: names compared without regard to case, and to
    spaces or underscores. A name that means several on either side is none, unless it is exactly the same."""
    exact = {name: number for number, name in enumerate(known)}
    folded: dict[str, list[int]] = {}
    for number, name in enumerate(known):
        folded.setdefault(_fold(name), []).append(number)
    own = [_fold(name) for name in class_names]
    found = {}
    for number, name in enumerate(class_names):
        alike = folded.get(own[number], [])
        if name in exact:
            found[number] = exact[name]
        elif len(alike) == 1 and own.count(own[number]) == 1:
            found[number] = alike[0]
    return found


def _fold(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


def weight_file(plan: Plan) -> Path:
    """The file of a plan's pretrained weights, downloaded if need be (safetensors only: no pickle is ever read).

    Raises:
        WeightsError: the file is missing or cannot be downloaded.
    """
    if plan.pretrained.value == "file":
        path = Path(plan.weights.value)
        if not path.is_file():
            raise WeightsError("The weight file is gone.", where=str(path), next="put it back, or pretrained=FILE")
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(plan.weights.value, WEIGHTS))
    except Exception as error:  # the client raises many kinds; all mean the same here
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"The weights {plan.weights.value} could not be downloaded: {first}",
            where="pretrained=",
            next="point to a file with pretrained=FILE.safetensors, or train from scratch with pretrained=false",
        ) from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, from its header.

    Raises:
        WeightsError: the file is not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"Not a safetensors file: {error}.", where=str(path),
                           next="check pretrained=FILE") from error  # fmt: skip


def load_weights(network: nn.Module, path: Path, class_names: Sequence[str] = ()) -> WeightReport:
    """Load a file into a network: everything but the head must be there and fit; of the head, the rows of the classes that
    the file knows by name are taken. That it has as many classes is no reason to keep a head.

    Args:
        class_names: Of the network's head, in its order.

    Raises:
        WeightsError: a tensor of the backbone is missing or has another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: Tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"Not a safetensors file: {error}.", where=str(path)) from error
    resize = getattr(__import__(type(network).__module__, fromlist=["x"]), "checkpoint_filter_fn", None)
    own: Tensors = network.state_dict()
    head = head_prefixes(network)
    if resize is not None and any(
        k in own and own[k].shape != v.shape and not k.startswith(head) for k, v in found.items()
    ):
        with (
            contextlib.suppress(Exception),
            warnings.catch_warnings(),
        ):  # positions of another image size, in timm's own words; else what does not fit is said below
            warnings.simplefilter("ignore")
            found = resize(found, network)
    taken = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape and not k.startswith(head)}
    problems = [
        f"{k}: " + ("missing" if k not in found else f"shape {tuple(found[k].shape)}, not {tuple(own[k].shape)}")
        for k in own
        if k not in taken and not k.startswith(head)
    ]
    if problems:
        raise WeightsError(f"{len(problems)} tensors of the backbone do not fit: {_some(problems)}.",
                           where=str(path), next="name the model that the weights belong to: model=NAME")  # fmt: skip
    names = [k for k in own if k.startswith(head)]
    rows, note = _head_rows({k: own[k] for k in names}, found, read_labels(path), class_names)
    network.load_state_dict(taken, strict=False)
    for name in names if rows else ():  # the state dict's tensors are the network's own
        own[name][list(rows)] = found[name][list(rows.values())].to(own[name])
    whole = names if len(rows) == len(class_names) > 0 else []
    return WeightReport(
        loaded=len(taken) + len(whole),
        initialised=tuple(k for k in own if k not in taken and k not in whole),
        unused=tuple(k for k in found if k not in taken and k not in names),
        known=tuple(class_names[number] for number in rows),
        head=note,
    )


def _head_rows(
    own: Tensors, found: Tensors, labels: Sequence[str], class_names: Sequence[str]
) -> tuple[dict[int, int], str]:
    """Which row of the file's head is which of the network's, and what becomes of the head, in words.

    Args:
        own: The head's tensors, each with a row per class: of a matrix, or of a convolution of one pixel.
    """
    if not own or any(k not in found or found[k].shape[1:] != v.shape[1:] for k, v in own.items()):
        return {}, "the head is new: the file has none that fits"
    if not labels:
        return {}, "the head is new: the file does not say which classes it knows"
    if any(len(found[k]) != len(labels) for k in own):
        return {}, "the head is new: the file names more or fewer classes than its head has"
    rows = match_labels(labels, class_names)
    if not rows:
        return {}, f"the head is new: none of the {len(labels):,} classes of the file is in the data"
    kept = [class_names[number] for number in rows]
    new = [name for number, name in enumerate(class_names) if number not in rows]
    left = [name for number, name in enumerate(labels) if number not in rows.values()]
    text = f"the head keeps {len(kept):,} of {len(class_names):,} classes by name ({_some(kept)})"
    text += f", new classes: {_some(new)}" if new else ""
    return rows, text + (f", classes left in the file: {_some(left)}" if left else "")
