"""Where a detector of the transformers library is described and where its weights are: a folder, or a repository of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from goodfit.config.detect import STEP
from goodfit.config.detector import COCO_DETECTORS
from goodfit.config.facts import ModelFacts
from goodfit.config.plan import Plan
from goodfit.core.errors import RequestError, StorageError, WeightsError
from goodfit.core.safeio import read_json
from goodfit.models.catalog import IMAGENET_MEAN, IMAGENET_STD, hub_problem
from goodfit.models.detection.detr import DetrNetwork, is_class_layer, library_class, settings
from goodfit.models.detection.transfer import take_tensors
from goodfit.models.weights import WEIGHTS, WeightReport, weight_file

CONFIG, PICTURES = "config.json", "preprocessor_config.json"
KINDS = ("d_fine", "rt_detr_v2", "deimv2", "rf_detr")  # by the library's names; the last has masks too
MASK_KIND = "rf_detr"
NOT_NORMALISED = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def find_detr(
    source: str, pretrained: str, *, asked: bool, masks: bool, config: dict[str, Any] | None = None
) -> tuple[ModelFacts, dict[str, Any]]:
    """Find a detector, and its weights.

    Args:
        source: A folder with a config.json, or a repository of the hub, as ORG/NAME.
        pretrained: "true", "false", or another folder of the same architecture.
        asked: Whether a person asked for the weights: then not having them is an error, otherwise a fact.
        config: Its configuration, where that is known already; how pictures are normalised is then known there too, and not looked up.

    Returns:
        Its facts, and its configuration as plain values.

    Raises:
        RequestError: the library is not installed, or this is none of its detectors.
        WeightsError: the description cannot be had, or weights that were asked for.
    """
    known = config is not None
    config = config or _described(source)
    kind = config.get("model_type")
    _check(kind, source, masks)
    weights, found_kind, problem = "", "none", ""
    if pretrained != "false":
        weights, found_kind, problem = _weights(source if pretrained == "true" else pretrained)
    if problem and asked:
        raise WeightsError(f"The weights of {source} cannot be had: {problem}.", where="pretrained=", kept="nothing was started",
                           next="use a folder with config.json and model.safetensors, or train from scratch with pretrained=false")  # fmt: skip
    if found_kind == "none" and not known and kind != MASK_KIND:
        config = {**config, "freeze_backbone_batch_norms": False}  # they know nothing yet
    try:
        network = DetrNetwork(config, num_classes=1, masks=masks)
    except Exception as error:  # the library checks its configurations with many kinds of errors
        raise RequestError(
            f"{CONFIG} describes no {kind} that transformers can build: {str(error)[:300]}", where=source
        ) from error
    mean, std = _usual_colours(str(kind)) if known else _colours(source, str(kind))
    own = settings(config, 1)
    facts = ModelFacts(
        name=source, num_parameters=sum(p.numel() for p in network.parameters()), native_imgsz=640, stride=_step(own), mean=mean, std=std,
        interpolation="bilinear", crop_share=1.0, weights=weights, weights_kind=found_kind, weights_problem=problem,
        licence=("Apache-2.0" if source in COCO_DETECTORS else "not stated; see its card") if weights else "none", has_drop_path=False, has_attention=True, size_step=_step(own),
        square=_windows(own) > 1, most_places=own.num_queries, strides=_strides(own),
        labels=_labels(config) if weights else (),
    )  # fmt: skip
    return facts, config


def load_detr(network: DetrNetwork, plan: Plan, class_names: Sequence[str]) -> WeightReport:
    """Load the weights of a plan; of the layers that tell classes apart, the rows of those known by name.

    They are read by the library, which knows older names of its tensors, and from safetensors only.

    Raises:
        WeightsError: they cannot be had, or do not fit.
    """
    folder = weight_file(plan).parent
    if plan.pretrained.value == "hub":
        _described(plan.weights.value)  # beside them
    config = _described(str(folder))
    labels = _labels(config)
    kind = library_class(masks=plan.task.value == "segment")
    own = settings(plan.detector.value["config"], len(labels))
    try:
        source, told = kind.from_pretrained(
            folder, config=own, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise WeightsError(f"transformers cannot load these weights: {str(error)[:300]}", where=str(folder),
                           next="use pretrained=false, or other weights") from error  # fmt: skip
    missing = [name for name in told["missing_keys"] if not is_class_layer(name.rpartition(".")[0])]
    if missing:
        raise WeightsError(f"{len(missing)} tensors of the detector are not among these weights (first: {missing[0]}).", where=str(folder),
                           next="use the folder that the model was described in")  # fmt: skip
    found = {f"network.{name}": tensor for name, tensor in source.state_dict().items()}
    return take_tensors(
        network, found, labels, class_names, where=str(folder), next="use the folder that the model was described in"
    )


def _described(source: str) -> dict[str, Any]:
    """The content of a config.json."""
    folder = Path(source)
    if not source or not (folder.is_dir() or _is_repository(source)):
        raise RequestError(f"detr/{source}: this is neither a folder with a {CONFIG} nor a repository of the hub.", where="model=",
                           next="model=detr/FOLDER, or model=detr/ORG/NAME as in detr/ustc-community/dfine-nano-coco")  # fmt: skip
    if not folder.is_dir():
        folder = _downloaded(source, CONFIG).parent
    try:
        found = read_json(folder / CONFIG)
    except StorageError as error:
        raise WeightsError(
            f"There is no {CONFIG} that can be read: {error.message}", where=str(folder), next="check model=detr/FOLDER"
        ) from error
    return dict(found) if isinstance(found, dict) else {}


def _is_repository(source: str) -> bool:
    return source.count("/") == 1 and all(part and not part.startswith((".", "~")) for part in source.split("/"))


def _downloaded(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    problem = hub_problem(repository, file)
    try:
        if not problem:
            return Path(hf_hub_download(repository, file))
    except Exception as error:  # the client raises many kinds; all mean the same here
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise WeightsError(f"The file {file} of {repository} cannot be had: {problem}.", where="model=", kept="nothing was started",
                       next="use model=detr/FOLDER with a copy of it, or model=fcos, which needs none")  # fmt: skip


def _check(kind: Any, source: str, masks: bool) -> None:
    if kind not in KINDS:
        raise RequestError(f"{source} describes a {kind or 'model without a type'}, which is none of the detectors that goodfit takes from "
                           "transformers.", where="model=", next=f"use one of {', '.join(KINDS)}")  # fmt: skip
    if masks and kind != MASK_KIND:
        raise RequestError(f"A {kind} gives no masks, and the data has some.", where="model=",
                           next="use an rf_detr or model=maskrcnn, or task=detect to learn the boxes alone")  # fmt: skip
    try:
        import scipy  # noqa: F401  the library's matching needs it
        import transformers  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"model=detr/... needs the package {error.name}.", where="model=", next="pip install 'goodfit[detr]'"
        ) from error


def _weights(source: str) -> tuple[str, str, str]:
    """Where the weights are, whether that is a "file", the "hub" or "none", and why they cannot be had ("" if they can)."""
    path = Path(source)
    path = path / WEIGHTS if path.is_dir() else path
    if path.is_file() and path.name == WEIGHTS:  # its config.json lies beside it
        return str(path.resolve()), "file", ""
    if Path(source).is_dir() or not _is_repository(source):
        return "", "none", f"there is no {WEIGHTS} in {source}"
    problem = hub_problem(source, WEIGHTS)
    return ("", "none", problem) if problem else (source, "hub", "")


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """The classes of the weights, in their order; one without a name is ""."""
    names = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    last = max(names, default=1)  # two without names: the library's default
    return tuple(names.get(number, "") for number in range(last + 1))


def _colours(source: str, kind: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation that pictures are normalised with: as the weights' own description has it, else as the family does."""
    try:
        folder = Path(source) if Path(source).is_dir() else _downloaded(source, PICTURES).parent
        found = read_json(folder / PICTURES)
        if not found.get("do_normalize", True):
            return NOT_NORMALISED
        mean, std = (tuple(float(v) for v in found[k]) for k in ("image_mean", "image_std"))
    except (WeightsError, StorageError, KeyError, TypeError, ValueError, AttributeError):
        return _usual_colours(kind)
    return (mean, std) if len(mean) == len(std) == 3 else _usual_colours(kind)


def _usual_colours(kind: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    return (IMAGENET_MEAN, IMAGENET_STD) if kind == MASK_KIND else NOT_NORMALISED


def _step(own: Any) -> int:
    """What both sides of an input are multiples of: 32, and whole windows of patches where the backbone attends within those."""
    return _strides(own)[0] * _windows(own) if own.model_type == MASK_KIND else STEP


def _windows(own: Any) -> int:
    """Windows each way that the backbone attends within. Where there are several, the library takes height for width when it cuts
    pictures into them, so that they must be square."""
    return int(getattr(own.backbone_config, "num_windows", 1))


def _strides(own: Any) -> tuple[int, ...]:
    """Pixels between the places of each level that the first stage chooses queries from."""
    if own.model_type != MASK_KIND:
        return tuple(int(s) for s in own.feat_strides)
    patch = own.backbone_config.patch_size
    return (int(patch if isinstance(patch, int) else patch[0]),)
