"""What is known about a network before it is built, and whether its pretrained weights can be had."""

from __future__ import annotations

import difflib
import math
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from goodfit.config.catalogue import CATALOGUE
from goodfit.config.facts import ModelFacts
from goodfit.core.errors import RequestError, WeightsError
from goodfit.models.stem import split_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HUB_SECONDS = 3.0  # to reach the hub at all; its client alone would retry for 23 s without a network

# Tried in this order when a weight file is given without a model: the catalogue's from the cheapest on, then other common ones.
FILE_CANDIDATES = tuple(dict.fromkeys((
    *(split_name(model.name).architecture for models in CATALOGUE.values() for model in models),
    "resnet26d", "resnet34", "resnet50", "mobilenetv4_conv_small", "vit_tiny_patch16_224", "vit_small_patch16_224",
    "deit_small_patch16_224", "regnety_004",
)))  # fmt: skip


def look_up(model: str, pretrained: str, *, asked: bool) -> ModelFacts:
    """Find a timm model and its weights.

    Args:
        model: A timm name, with or without a weight tag; "" if it is to be found by the tensors of `pretrained`.
        pretrained: "true", "false", a weight name, a .safetensors file, or the folder of a bundle or run.
        asked: Whether a person asked for the weights: then not having them is an error, otherwise a fact.

    Raises:
        RequestError: there is no such model.
        WeightsError: the weights were asked for and cannot be had.
    """
    import timm

    from goodfit.models.weights import find_weights, read_bundle, with_source

    file = find_weights(pretrained)
    bundle = None if file is None else read_bundle(file)
    if bundle is not None:
        name = _same_model(model, bundle.model, f"The bundle {pretrained} holds")
    elif file is not None:
        name = model or match_file(file)
    elif pretrained not in ("true", "false"):
        name = _with_tag(model, pretrained)
    else:
        name = model
    parts = split_name(name)
    if not timm.is_model(parts.architecture):
        near = difflib.get_close_matches(parts.architecture, timm.list_models(), n=3)
        raise RequestError(f"There is no model called {name}.", where="model=",
                           next=f"try {', '.join(near)}" if near else "goodfit models; timm.list_models() has all")  # fmt: skip
    config = _pretrained_config(parts.in_timm)
    weights, kind, problem = "", "none", ""
    if file is not None:
        weights, kind = str(file), "file"
    elif pretrained != "false":
        weights, problem = _hub_weights(name, config)
        kind = "none" if problem else "hub"
        if problem and asked:
            raise WeightsError(
                f"The pretrained weights of {name} cannot be had: {problem}.",
                where="pretrained=",
                kept="nothing was started",
                next="point to a file with pretrained=FILE.safetensors, or train from scratch with pretrained=false",
            )
    facts = _facts(name, config, weights, kind, problem)
    return facts if file is None else with_source(facts, file, bundle)


def _with_tag(model: str, weights: str) -> str:
    return _same_model(model, weights.removeprefix("timm/"), f"The weights {weights} belong to")


def _same_model(asked: str, found: str, what: str) -> str:
    """The model that weights belong to, with the stem that was asked for; raises WeightsError if another was asked for."""
    own, wanted = split_name(found), split_name(asked)
    if asked and wanted.architecture != own.architecture:
        raise WeightsError(f"{what} {own.architecture}, not {asked}.", where="pretrained=",
                           next=f"use model={own.architecture}, or other weights")  # fmt: skip
    return replace(own, stem=wanted.stem or own.stem).text


def _pretrained_config(name: str) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name)
    except (RuntimeError, ValueError) as error:
        raise RequestError(f"There are no weights called {name}: {error}.", where="model=") from error
    return config.to_dict() if config is not None else {}


def _hub_weights(name: str, config: dict[str, Any]) -> tuple[str, str]:
    """The hub repository of a model's weights, and why they cannot be had ("" if they can)."""
    repository = config.get("hf_hub_id") or ""
    if not repository:
        return "", f"timm has no pretrained weights for {name}"
    repository = repository.split("@")[0]
    return repository, hub_problem(repository, "model.safetensors")


def hub_problem(repository: str, file: str) -> str:
    """Why a file of a hub repository cannot be had, as far as is known before it is asked for; "" if it can."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, file), str):
        return ""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set and they are not in the local cache"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return ""  # reachable through a proxy, or the download will say why not
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=HUB_SECONDS).close()
    except OSError as error:
        return f"the model hub cannot be reached ({error.strerror or error})"
    return ""


def _facts(name: str, config: dict[str, Any], weights: str, kind: str, problem: str) -> ModelFacts:
    import torch

    from goodfit.models.builder import create

    with torch.device("meta"):
        network = create(name, num_classes=1)
    size = config.get("input_size", (3, 224, 224))
    fixed = bool(config.get("fixed_input_size"))
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    stride = int(patch[0]) if isinstance(patch, tuple) else (int(patch) if patch else 1)
    if fixed and not patch:
        stride = int(size[-1])  # a model of one input size only
    return ModelFacts(
        name=name,
        num_parameters=sum(p.numel() for p in network.parameters()),
        native_imgsz=int(size[-1]),
        stride=stride,
        mean=tuple(config.get("mean", IMAGENET_MEAN)),
        std=tuple(config.get("std", IMAGENET_STD)),
        interpolation=config.get("interpolation", "bicubic"),
        crop_share=float(config.get("crop_pct", 0.875)),
        weights=weights,
        weights_kind=kind,
        weights_problem=problem,
        licence=_licence(config, kind),
        has_drop_path=_takes(name, "drop_path_rate"),
        has_attention=any("Attention" in type(module).__name__ for module in network.modules()),
        size_step=0 if fixed else _size_step(network, stride),
    )


def _size_step(network: Any, stride: int) -> int:
    """A step between input sides in which the network's last map grows by whole pixels: its own reduction, 32 at least."""
    levels = getattr(network, "feature_info", None) or ()
    reductions = [int(level["reduction"]) for level in levels if isinstance(level, dict) and "reduction" in level]
    return math.lcm(stride, max([32, *reductions]))


def _licence(config: dict[str, Any], kind: str) -> str:
    if kind == "none":
        return "none: trained from scratch"
    known = config.get("license") or "not stated by timm"
    return f"{known} (of timm's weights of this model; check your file's own)" if kind == "file" else known


def _takes(name: str, argument: str) -> bool:
    import torch

    from goodfit.models.builder import create

    try:
        with torch.device("meta"):
            network = create(name, num_classes=1, **{argument: 0.5})
    except TypeError:
        return False
    return any(type(module).__name__ == "DropPath" for module in network.modules())


def match_file(path: Path) -> str:
    """The model whose tensors have the names and shapes of a weight file, the head left aside.

    Raises:
        WeightsError: the file is not safetensors, or fits none of the models that are tried.
    """
    import timm
    import torch

    from goodfit.models.builder import create
    from goodfit.models.groups import head_prefixes
    from goodfit.models.weights import read_shapes

    shapes = read_shapes(path)
    stem = path.name.removesuffix(".safetensors").split(".")[0]
    for name in dict.fromkeys((stem, *FILE_CANDIDATES)):
        if not timm.is_model(name):
            continue
        with torch.device("meta"):
            network = create(name, num_classes=1000)
        prefixes = head_prefixes(network)
        own = {k: tuple(v.shape) for k, v in network.state_dict().items() if not k.startswith(prefixes)}
        if own == {k: s for k, s in shapes.items() if not k.startswith(prefixes)}:
            return name
    raise WeightsError("The tensors of the file fit none of the models that are tried without a name.",
                       where=str(path), next="name the model: model=NAME (any timm name)")  # fmt: skip
