"""Detectors of the transformers library (extra `detr`): D-FINE (Peng et al. 2024), RT-DETRv2 (Lv et al. 2024), DEIMv2 (Huang et al.
2025) and RF-DETR (Robinson et al. 2025), the last with masks too.

Networks, matching and losses are the library's. A description of one is its config.json, in a folder or on the hub; it is kept in the
plan, so that nothing has to be found again.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from goodfit.models.detection.choose import Found, choose_objects
from goodfit.models.detection.family import Family, Terms, cut_at_edges, shape_of, unmoved_random
from goodfit.models.detection.transfer import ClassLayer
from goodfit.runtime.detections import Selection

MASK_SIDE = 28  # places that a mask is read at within its box, each way, as Mask R-CNN has it
BACKBONES = ("backbone", "conv_encoder")  # the library's names of the part that sees pictures
ONE_ANSWER = Selection(iou=1.0)  # for an object: there are no doubles
CLOSE_CALL = 1e-5  # of a score
FIXED = (5, 23)  # transformers' first version known to keep denoising queries out of the main loss (its PR 48528)
_CLASS_LAYERS = re.compile(r"(class_embed|enc_score_head)(\.\d+)?$")
_NOT_ARCHITECTURE = ("transformers_version", "architectures", "id2label", "label2id", "torch_dtype", "dtype", "auto_map",
                     "_name_or_path")  # fmt: skip


def settings(config: dict[str, Any], num_classes: int) -> Any:
    """The library's configuration of a detector of so many classes.

    What belongs to one size of picture is left away, so that any is taken. Denoising is off where the library computed the main loss
    over the denoising queries too.
    """
    import transformers

    # Copies: the library changes what it is given.
    kept = {k: copy.deepcopy(v) for k, v in config.items() if k not in _NOT_ARCHITECTURE}
    kept |= {k: None for k in ("anchor_image_size", "eval_size") if k in kept}
    if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < FIXED:
        kept["num_denoising"] = 0
    return transformers.AutoConfig.for_model(kept.pop("model_type"), num_labels=num_classes, **kept)


def is_class_layer(name: str) -> bool:
    """Whether the library's module of this name has a row for every class."""
    return bool(_CLASS_LAYERS.search(name))


def library_class(*, masks: bool) -> Any:
    """The library's class that builds and loads a detector, or one with masks."""
    import transformers

    return transformers.RfDetrForInstanceSegmentation if masks else transformers.AutoModelForObjectDetection


class DetrNetwork(nn.Module):
    """The library's network around a configuration; images (N, 3, H, W), and its outputs as it gives them.

    Its loss, attention that reads at places between pixels, and the heads whose offsets are added to places are computed in float32
    whatever the rest is: half precision has too few digits.
    """

    def __init__(self, config: dict[str, Any], *, num_classes: int, masks: bool = False) -> None:
        super().__init__()
        kind, wanted = library_class(masks=masks), settings(config, num_classes)
        self.network = kind(wanted) if masks else kind.from_config(wanted)
        self.network.loss_function = _Loss(self.network.loss_function)
        _leave_unused_away(self.network)
        for name, module in self.network.named_modules():
            places = "bbox" in name.rstrip("0123456789.").rpartition(".")[2] and not isinstance(module, nn.ModuleList)
            if places or type(module).__name__.endswith("MultiscaleDeformableAttention"):
                kind_of: Any = type(module)
                module.__class__ = _in_float32(kind_of)
        self.pretrained_cfg = {"classifier": _all_but_backbone(self.network)}
        self.class_layers = tuple(
            ClassLayer(f"network.{name}", padding=isinstance(module, nn.Embedding))
            for name, module in self.network.named_modules()
            if is_class_layer(name) and isinstance(module, nn.Linear | nn.Embedding)
        )

    def forward(self, images: torch.Tensor, labels: list[dict[str, torch.Tensor]] | None = None) -> Any:
        """The library's outputs: `logits` (N, Q, classes), `pred_boxes` (N, Q, 4) and, with labels, `loss`."""
        return self.network(pixel_values=images, labels=labels)


def _all_but_backbone(network: nn.Module) -> tuple[str, ...]:
    """What is trained at the rate of a head: the backbone is slower, as its authors have it."""
    names: list[str] = []
    parts = [("network", network)]
    while parts:
        place, module = parts.pop(0)
        for name, child in module.named_children():
            inside = any(part in BACKBONES for path, _ in child.named_modules() for part in path.split("."))
            if name not in BACKBONES:
                (parts.append((f"{place}.{name}", child)) if inside else names.append(f"{place}.{name}"))
    return tuple(names)


def _leave_unused_away(network: nn.Module) -> None:
    """Cut the layers of RF-DETR's backbone that come after the last whose map is used: they would never get a gradient."""
    for module in network.modules():
        config = getattr(module, "config", None)
        if type(module).__name__ == "RfDetrDinov2Backbone" and config is not None:
            module.encoder.layer = module.encoder.layer[: max(config.out_indices)]


@functools.cache
def _in_float32(kind: type[nn.Module]) -> type[nn.Module]:
    """The same module, computed in float32 under autocast too. A class and not a wrapped method: copies of the network stay whole."""

    class InFloat32(kind):
        def forward(self, *values: Any, **named: Any) -> Any:
            with torch.autocast(_device_of(values, named), enabled=False):
                return super().forward(*map(_as_float32, values), **{k: _as_float32(v) for k, v in named.items()})

    InFloat32.__name__ = kind.__name__
    return InFloat32


@dataclass(frozen=True)
class _Loss:
    """The library's loss, in float32; RF-DETR's for as many groups of queries as there are, as it counts those of training in
    evaluation too, where there is one, and with masks as one number also where no picture has an object. Of D-FINE and DEIMv2 the
    first guess has a term of its own (see `_first_guess`)."""

    function: Callable[..., Any]

    def __call__(
        self, logits: torch.Tensor, labels: Any, device: Any, boxes: torch.Tensor, *more: Any, **named: Any
    ) -> Any:
        values = [_with_groups(v, logits) for v in more]
        guess, values = _first_guess(values, named)
        with torch.autocast(logits.device.type, enabled=False):
            loss, terms, outputs = self.function(logits.float(), labels, device, boxes.float(), *map(_as_float32, values),
                                                 **{k: _as_float32(v) for k, v in named.items()})  # fmt: skip
            if guess:
                loss = loss + self.function(guess[0].float(), labels, device, guess[1].float(), guess[2])[0]
        if loss.numel() != 1:  # terms of no masks have no elements, and so has their sum; of boxes there are none
            (config,) = (v for v in values if hasattr(v, "class_loss_coefficient"))
            loss = sum(
                t.sum() * (config.class_loss_coefficient if k.startswith("loss_ce") else 0.0) for k, t in terms.items()
            )
        return loss, terms, outputs


def _first_guess(values: list[Any], named: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What D-FINE and DEIMv2 guess before corners are refined, and the library's arguments without it.

    Since 5.24 the decoder puts that guess before the outputs of its layers, while the loss pairs them with the corners one by one:
    each layer's boxes then stand beside the corners of the next, and the last but one is taught nothing. So the layers are handed over
    alone, and classes and boxes of the guess get a loss apart, as in the authors' code; but for the noisy queries, from which they teach
    the guess too, and DEIMv2's union of matches, which here is that of the layers.

    Returns:
        Logits (N, Q, classes), boxes (N, Q, 4) and a configuration for a loss of these alone, or nothing where there is no guess;
        and the arguments.
    """
    corners = named.get("predicted_corners")
    if corners is None or not values[0].auxiliary_loss or values[1].shape[1] == corners.shape[1]:
        return [], values
    config, logits, boxes = values
    alone = copy.copy(config)
    alone.auxiliary_loss = False
    noise = named.get("denoising_meta_values")
    first = [m[:, 0] if noise is None else m[:, 0].split(noise["dn_num_split"], dim=1)[1] for m in (logits, boxes)]
    return [*first, alone], [config, logits[:, 1:], boxes[:, 1:]]


def _with_groups(value: Any, logits: torch.Tensor) -> Any:
    if not hasattr(value, "group_detr"):
        return value
    made = copy.copy(value)
    made.group_detr = logits.shape[1] // value.num_queries
    return made


def _as_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return type(value)(map(_as_float32, value)) if type(value) in (list, tuple) else value


def _device_of(values: tuple[Any, ...], named: dict[str, Any]) -> str:
    return next((v.device.type for v in (*values, *named.values()) if isinstance(v, torch.Tensor)), "cpu")


@dataclass(frozen=True, kw_only=True)
class Detr(Family):
    """What belongs to a `DetrNetwork` besides its weights.

    The library gives one loss, the sum of its weighted terms, each divided by the objects of the batch: times those it is a sum, and
    they are its count. It is not exactly additive: the noise of denoising queries and the distillation of D-FINE belong to a batch.
    """

    has_masks: bool = False
    exact: bool = False
    exports: bool = True
    fixed_batch: bool = True
    selection: Selection = ONE_ANSWER

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """The library's loss."""
        return _term(model(batch["image"], self._labels(batch)), batch)

    def predict(self, model: nn.Module, batch: dict[str, Any], how: Selection) -> tuple[list[Found], Terms]:
        """The best queries, and the loss if the batch has targets."""
        images = batch["image"]
        labels = self._labels(batch) if "boxes" in batch else None
        with unmoved_random(images.device):  # the loss of masks looks at random places
            outputs = model(images, labels)
        boxes, scores = _decoded(outputs, shape_of(images))
        masks = outputs.pred_masks.float() if self.has_masks else [None] * len(boxes)
        found = [_chosen(b, s, m, how, shape_of(images)) for b, s, m in zip(boxes, scores, masks, strict=True)]
        return found, _term(outputs, batch) if labels is not None else {}

    def candidates(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Boxes (N, Q, 4) and scores (N, Q, classes) of the queries, in the order of the first stage's scores."""
        return _decoded(model(images), shape_of(images))

    def is_close_call(self, model: nn.Module, images: torch.Tensor) -> bool:
        """Whether the last place that the first stage takes and the first that it leaves rate alike, as all do in a new network. Of
        RF-DETR it is not known: the library keeps the places taken only."""
        network: Any = model
        scores, num = network(images).enc_outputs_class.float().amax(dim=2), network.network.config.num_queries
        if scores.shape[1] <= num:
            return False
        best = scores.topk(num + 1, dim=1).values
        return bool((best[:, -2] - best[:, -1] <= CLOSE_CALL * best[:, -1].abs().clamp(min=1.0)).any())

    def _labels(self, batch: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        height, width = shape_of(batch["image"])
        scale = torch.tensor([width, height, width, height], device=batch["boxes"].device)
        made = []
        for number, classes in enumerate(batch["classes"]):
            there = classes >= 0
            low, high = (batch["boxes"][number][there].float() / scale).chunk(2, dim=1)
            one = {"class_labels": classes[there], "boxes": torch.cat([(low + high) / 2, high - low], dim=1)}
            made.append({**one, "masks": batch["masks"][number][: len(low)].float()} if self.has_masks else one)
        return made


def _term(outputs: Any, batch: dict[str, Any]) -> Terms:
    count = (batch["classes"] >= 0).sum()
    return {"loss": (outputs.loss.squeeze() * count.clamp(min=1), count)}


def _decoded(outputs: Any, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    middle, size = outputs.pred_boxes.float().chunk(2, dim=2)
    scale = torch.tensor([shape[1], shape[0], shape[1], shape[0]], device=middle.device)
    boxes = torch.cat([middle - size / 2, middle + size / 2], dim=2) * scale
    return cut_at_edges(boxes, shape), outputs.logits.float().sigmoid()


def _chosen(
    boxes: torch.Tensor, scores: torch.Tensor, masks: torch.Tensor | None, how: Selection, shape: tuple[int, int]
) -> Found:
    """The objects of one image. masks: logits of every query over the whole input, shape (Q, h, w)."""
    if masks is None:
        return choose_objects(boxes, scores, how)
    from torchvision.ops import roi_align

    found = choose_objects(boxes, scores, how)
    maps = masks[found.candidates].sigmoid().unsqueeze(1)
    cut = roi_align(maps, list(found.boxes.split(1)), MASK_SIDE, masks.shape[-1] / shape[1], aligned=True)
    return replace(found, masks=cut.squeeze(1))
