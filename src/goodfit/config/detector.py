"""Which detector: a family over a backbone, or one of transformers, and where its pretrained weights come from."""

from __future__ import annotations

import math

from goodfit.config.chooser import Chooser
from goodfit.config.facts import DataFacts, MachineFacts
from goodfit.config.plan import Decision, Plan
from goodfit.config.request import TrainRequest
from goodfit.core.errors import RequestError

FAMILIES = ("fcos", "retinanet", "ssdlite", "fasterrcnn", "maskrcnn", "detr")
BOX_FAMILIES = ("fcos", "retinanet", "ssdlite", "fasterrcnn", "detr")
MASK_FAMILIES = ("maskrcnn", "detr")
SCRATCH = ("resnet10t", "small pictures, which share little with the photos that weights were trained on")
SMALL_SIDE = 160  # pixels
BACKBONES = {
    "cpu": ("mobilenetv2_100", "few multiply-adds and good maps: a processor"),
    "cuda": ("resnet50", "this GPU has room for it"),
}
# Of transformers, pretrained on COCO, which model=auto takes on a GPU: D-FINE's smaller ones, whose weights and code are Apache-2.0.
COCO_DETECTORS = ("ustc-community/dfine-nano-coco", "ustc-community/dfine-small-coco")
COCO_PICTURES = (
    1000  # for training, from which: of its fine-tuning on small sets, near-zero AP is reported again and again
)
COCO_QUERIES = 300  # answers that these give for a picture; of crowded ones half would be few to choose from
COCO_SECONDS = 3600.0  # that a run may take, from which the second of them


def split_model(name: str | None) -> tuple[str, str]:
    """Family and backbone of a name as `fcos/resnet18`, `fcos` or `resnet18`; "" where it says nothing.

    Raises:
        RequestError: there is no such family.
    """
    if not name:
        return "", ""
    first, slash, rest = name.partition("/")
    if first == "detr" and not rest:
        raise RequestError("model=detr says no detector of transformers.", where="model=",
                           next="model=detr/FOLDER, or model=detr/ORG/NAME of the hub, as in detr/ustc-community/dfine-nano-coco")  # fmt: skip
    if first in FAMILIES:
        return first, rest
    if slash:
        raise RequestError(f"There is no family of detectors called {first}.", where="model=",
                           next=f"{', '.join(FAMILIES)}, as in model={FAMILIES[0]}/resnet18")  # fmt: skip
    return "", first


def coco_detector(request: TrainRequest, data: DataFacts, machine: MachineFacts) -> tuple[str, str]:
    """The repository of a transformer that is to be tried before the rule of `resolve_detector`, and why; "" where none is, and why."""
    if request.model is not None or (request.pretrained or "true") != "true":
        return "", ""
    if data.task != "detect" or data.median_side <= SMALL_SIDE:
        return "", ""
    if machine.device != "cuda":
        return "", "on a GPU, a transformer pretrained on COCO would be tried"
    if data.num_train < COCO_PICTURES:
        return "", f"from {COCO_PICTURES:,} pictures on, a transformer pretrained on COCO would be tried"
    if 2 * data.most_objects > COCO_QUERIES:
        return (
            "",
            f"up to {data.most_objects:,} objects a picture: too many for the {COCO_QUERIES} answers of a transformer pretrained on COCO",
        )
    large = (request.time or math.inf) >= COCO_SECONDS
    why = f"{data.num_train:,} pictures, a GPU{'' if large else ', little time'}: a transformer that COCO's objects have taught"
    return COCO_DETECTORS[large], why


def resolve_detector(
    request: TrainRequest, data: DataFacts, machine: MachineFacts, base: Plan | None = None, *, weights: bool = True
) -> tuple[Decision[str], Decision[str]]:
    """The model, as family/backbone, and where its pretrained weights come from.

    The backbone is "" where it is to be found by the tensors of a weight file.

    Args:
        weights: Whether pretrained weights can be had, as far as is known.

    Raises:
        RequestError: there is no such family, or it does not fit the task.
    """
    choose = Chooser(request, base)
    masks, small = data.task == "segment", data.median_side <= SMALL_SIDE
    if base is not None and base.task.value != data.task:
        raise RequestError(
            f"plan={request.plan}: this is a plan for the task {base.task.value}.",
            next=f"give one for the task {data.task}",
        )
    family, backbone = split_model(request.model if base is None or request.model else base.model.value)
    if base is not None and request.pretrained is None:
        same = {"file": base.weights.value, "hub": "true"}.get(base.pretrained.value, "false")
        pretrained = Decision(same, base.pretrained.reason, base.pretrained.source)
    else:
        pretrained = choose("pretrained", "false" if small else "true", f"pictures of {data.median_side} px share little with photos" if small else
                            f"{data.num_train:,} pictures: a backbone that has seen photos learns far faster")  # fmt: skip
    file = pretrained.value not in ("true", "false")
    usual, why = BACKBONES["cuda" if machine.device == "cuda" else "cpu"]
    if small or not weights:
        usual, why = SCRATCH[0], SCRATCH[1] if small else "no pretrained weights: the smallest that learns from scratch"
    family = family or ("maskrcnn" if masks else FAMILIES[0])
    if family not in (MASK_FAMILIES if masks else BOX_FAMILIES):
        raise RequestError(f"model={family}: this family gives {'no masks' if masks else 'masks'}, and the data {'has some' if masks else 'has none'}.",
                           where="model=", next=f"use model={MASK_FAMILIES[0] if masks else FAMILIES[0]}, or task=detect to learn the boxes alone")  # fmt: skip
    kind = "two stages, of which the second gives masks" if masks else "one stage without anchors to choose"
    if family == "detr":
        kind = "a transformer that gives one answer for an object"
    reason = f"{family}, {kind}; {why}" if not backbone else "asked for"
    if not backbone and not (file and pretrained.source == "asked"):
        backbone = usual
    source = "asked" if request.model is not None else "rule" if base is None else base.model.source
    return Decision(f"{family}/{backbone}", reason, source), pretrained
