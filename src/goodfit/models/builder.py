"""Build a network, load pretrained weights with a strict report, and group its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from goodfit.config.plan import Plan
from goodfit.core.errors import RequestError, WeightsError
from goodfit.models.stem import set_stem, split_name

MAX_NAMED = 5  # tensors named in a report


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What loading did: how many tensors were taken, which are new, which of the file were left."""

    loaded: int
    initialised: tuple[str, ...]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """One line for the terminal and the report."""
        text = f"{self.loaded} tensors loaded"
        if self.initialised:
            text += f", new: {_some(self.initialised)}"
        if self.unused:
            text += f", left in the file: {_some(self.unused)}"
        return text


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def create(name: str, *, num_classes: int, **arguments: Any) -> nn.Module:
    """A timm network with a new head and random weights (timm's own initialisation), its stem as the name says."""
    import timm

    parts = split_name(name)
    made = timm.create_model(parts.architecture, pretrained=False, num_classes=num_classes, **arguments)
    assert isinstance(made, nn.Module)
    if parts.stem:
        set_stem(made, parts.stem)
    return made


def head_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Names that the parameters of the classifier begin with, from timm's own record of it."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    classifier = config.get("classifier") or "fc"
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)


def build_network(plan: Plan, num_classes: int) -> tuple[nn.Module, WeightReport | None]:
    """The network of a plan, initialised from its seed, with its pretrained weights loaded.

    The caller's random state is left as it was.

    Raises:
        RequestError: the model does not take dropout or drop_path, or this image size.
        WeightsError: the weights cannot be downloaded, or do not fit.
    """
    arguments: dict[str, Any] = {}
    if plan.dropout.value > 0:
        arguments["drop_rate"] = plan.dropout.value
    if plan.drop_path.value > 0:
        arguments["drop_path_rate"] = plan.drop_path.value
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed.value)
        network = create_at_size(plan.model.value, plan.imgsz.value, num_classes=num_classes, **arguments)
        head = [p for n, p in network.named_parameters() if n.startswith(head_prefixes(network))]
        for parameter in head:  # near-zero logits: the loss starts at chance, ln(classes)
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)
    report = None
    if plan.pretrained.value != "false":
        report = load_weights(network, weight_file(plan))
    return network, report


def create_at_size(name: str, imgsz: int, *, num_classes: int, **arguments: Any) -> nn.Module:
    """A timm network for square images of `imgsz` pixels, with random weights.

    Vision transformers are built for one image size and say so by taking `img_size`; others take any.

    Raises:
        RequestError: it does not take these arguments, or this image size.
    """
    try:
        network = create(name, num_classes=num_classes, **arguments)
        config: Any = getattr(network, "pretrained_cfg", None) or {}
        if config.get("fixed_input_size") and config.get("input_size", (3, 0, 0))[-1] != imgsz:
            network = create(name, num_classes=num_classes, img_size=imgsz, **arguments)
    except (TypeError, AssertionError) as error:
        raise RequestError(f"{name} cannot be built with {arguments or imgsz}: {error}.",
                           where="model=", next="leave out dropout=, drop_path= or imgsz=") from error  # fmt: skip
    return network


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
        return Path(hf_hub_download(plan.weights.value, "model.safetensors"))
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


def load_weights(network: nn.Module, path: Path) -> WeightReport:
    """Load a file into a network: everything but the head must be there and fit; the head is kept where it fits.

    Raises:
        WeightsError: a tensor of the backbone is missing or has another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"Not a safetensors file: {error}.", where=str(path)) from error
    resize = getattr(__import__(type(network).__module__, fromlist=["x"]), "checkpoint_filter_fn", None)
    own = network.state_dict()
    if resize is not None and any(k in own and own[k].shape != v.shape and "pos_embed" in k for k, v in found.items()):
        found = resize(found, network)
    prefixes = head_prefixes(network)
    taken = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape and not k.startswith(prefixes)}
    problems = [
        f"{k}: " + ("missing" if k not in found else f"shape {tuple(found[k].shape)}, not {tuple(own[k].shape)}")
        for k in own
        if k not in taken and not k.startswith(prefixes)
    ]
    if problems:
        raise WeightsError(f"{len(problems)} tensors of the backbone do not fit: {_some(tuple(problems))}.",
                           where=str(path), next="name the model that the weights belong to: model=NAME")  # fmt: skip
    network.load_state_dict(taken, strict=False)
    new = tuple(k for k in own if k not in taken)
    return WeightReport(len(taken), new, tuple(k for k in found if k not in taken and not k.startswith(prefixes)))


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay, in the model's own order."""

    name: str
    names: tuple[str, ...]
    lr: float
    weight_decay: float
    head: bool = False


def parameter_groups(network: nn.Module, plan: Plan) -> list[ParameterGroup]:
    """Backbone and head, each with and without decay: norms, biases and other vectors are not decayed."""
    prefixes = head_prefixes(network)
    table: dict[str, list[str]] = {}
    for name, parameter in network.named_parameters():
        part = "head" if name.startswith(prefixes) else "backbone"
        table.setdefault(part if parameter.ndim > 1 else f"{part} norms and biases", []).append(name)
    return [
        ParameterGroup(
            part,
            tuple(names),
            plan.head_lr.value if part.startswith("head") else plan.lr.value,
            0.0 if part.endswith("biases") else plan.weight_decay.value,
            head=part.startswith("head"),
        )
        for part, names in table.items()
    ]
