"""How weights are updated: optimizer, learning rates, schedule, lengths, what is frozen, what is averaged.

Pure functions of what was asked and what is known; the only home of these defaults.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar

from goodfit.config.chooser import Chooser
from goodfit.config.durations import in_epochs, parse_length
from goodfit.config.execution import BATCH
from goodfit.config.facts import Facts
from goodfit.config.measured import Measured
from goodfit.config.plan import Decision
from goodfit.core.errors import RequestError

LR = {
    "adamw": 1e-3,
    "adam": 1e-3,
    "nadam": 1e-3,
    "radam": 1e-3,
    "rmsprop": 1e-4,
    "sgd": 0.05,
    "muon": 1e-3,
}  # at batch 64
BACKBONE_LR = (
    0.3  # of the rate from scratch, where the backbone is pretrained (trashnet: 1.0 lost 4 points, see dev/LOG.md)
)
HEAD_LR = 10  # times the rate of a pretrained backbone
EPOCHS = 300
MOST_EPOCHS = 1200
DECAY = 0.2
ALL_BUT_HEAD = "all-but-head"  # of `freeze`
T = TypeVar("T")


def choose_recipe(choose: Chooser, facts: Facts, batch: int) -> dict[str, Decision[Any]]:
    """The decisions of this module, by their names in the plan.

    Args:
        batch: Samples per update.
    """
    pretrained = facts.model.weights_kind != "none"
    optimizer = choose("optimizer", "adamw", "steady over learning rates, the usual choice for fine-tuning")
    lr, head_lr = _learning_rates(choose, optimizer.value, batch, pretrained, facts.measured)
    head_lr = _known_head(choose, facts, lr, head_lr)
    lengths = _lengths(choose)
    steps_per_epoch = max(1, facts.data.num_train // batch)
    decayed = optimizer.value in ("adamw", "muon")
    return {
        **lengths,
        "optimizer": optimizer,
        "lr": lr,
        "head_lr": head_lr,
        **_transfer(choose, pretrained, lengths["epochs"].value, steps_per_epoch),
        "weight_decay": choose("weight_decay", 0.01 if decayed else 1e-4,
                               "the guides' default for AdamW, little for others; none on norms and biases"),
        "momentum": choose("momentum", 0.9, "the usual value"),
        **_schedule(choose, lengths["epochs"].value, steps_per_epoch),
        "clip": choose("clip", 1.0, "a guard against rare large gradients"),
        "clip_value": choose("clip_value", 0.0, "the norm is limited, not single elements"),
        "ema": choose("ema", True, "the average of the last steps validates better than the last step"),
        "swa": choose("swa", 0.0, "the moving average does the same"),
        "patience": choose("patience", 50, "the guides' default; warm-up is not counted"),
        "min_delta": choose("min_delta", 0.001, "the guides' default, relative"),
    }  # fmt: skip


def _lengths(choose: Chooser) -> dict[str, Decision[Any]]:
    epochs = choose("epochs", EPOCHS, "a budget: early stopping ends the run when it stops improving")
    if epochs.source == "asked":
        most = Decision(epochs.value, "so many were asked for", "rule")
    else:
        most = choose(
            "most_epochs", MOST_EPOCHS, f"a run that still improves goes on to {2 * EPOCHS}, then {MOST_EPOCHS}"
        )
    return {"epochs": epochs, "most_epochs": most, "time": choose("time", 0.0, "no limit was asked for")}


def _known_head(choose: Chooser, facts: Facts, lr: Decision[float], head_lr: Decision[float]) -> Decision[float]:
    """The backbone's rate for a head that knows every class already: it has nothing to catch up with."""
    knows_all = 0 < facts.data.num_classes <= facts.model.known_classes
    if choose.base is not None or head_lr.source != "rule" or not knows_all:
        return head_lr
    return Decision(lr.value, "as the backbone's: the head of the weights knows all the classes", "rule")


def _transfer(choose: Chooser, pretrained: bool, epochs: int, steps_per_epoch: int) -> dict[str, Decision[Any]]:
    """Rates by layer, what is frozen and until when.

    Raises:
        RequestError: what was asked contradicts itself, is no length, or comes after the end.
    """
    layer_decay = choose("layer_decay", 1.0, "one rate for all layers of the backbone")
    freeze, unfreeze = choose("freeze", "", "everything trains"), choose("unfreeze", "never", "frozen to the end")
    if freeze.value.strip().lower() in ("off", "none", "no", "false", "0"):
        freeze = replace(freeze, value="")
    until = _until(unfreeze.value, epochs, steps_per_epoch)
    if unfreeze.source == "asked" and until != "never" and not freeze.value:
        if choose.request.freeze is not None:
            raise RequestError(f"freeze={choose.request.freeze} contradicts unfreeze={unfreeze.value}: nothing is frozen.",
                               next="leave one of them out")  # fmt: skip
        freeze = Decision(ALL_BUT_HEAD, f"unfreeze={unfreeze.value} was asked for: the head trains first", "rule")
    unfreeze = replace(unfreeze, value=until) if freeze.value else Decision("never", "nothing is frozen", "rule")
    if not pretrained:
        layer_decay, freeze = _said_of_scratch(layer_decay, 1.0), _said_of_scratch(freeze, "")
    return {"layer_decay": layer_decay, "freeze": freeze, "unfreeze": unfreeze}


def _said_of_scratch(decision: Decision[T], off: T) -> Decision[T]:
    """What was asked for although nothing is pretrained is done, and said."""
    if decision.source != "asked" or decision.value == off:
        return decision
    return replace(decision, reason=f"{decision.reason}, although nothing is pretrained")


def _until(text: str, epochs: int, steps_per_epoch: int) -> str:
    """How long something is frozen: "never" thawed, "gradual", or a number of epochs."""
    text = text.strip().lower()
    if text in ("never", "gradual"):
        return text
    try:
        length = in_epochs(parse_length(text), epochs=epochs, steps_per_epoch=steps_per_epoch)
    except ValueError as error:
        raise RequestError(f"unfreeze={text} {error}, or never, or gradual.", where="unfreeze=") from error
    if not 0 < length < epochs:
        raise RequestError(f"unfreeze={text} is not within the run of {epochs} epochs.", where="unfreeze=",
                           next="unfreeze=never keeps it frozen; freeze=off freezes nothing")  # fmt: skip
    return f"{length:g}"


def _schedule(choose: Chooser, epochs: int, steps_per_epoch: int) -> dict[str, Decision[Any]]:
    """The schedule and its lengths, which are asked as epochs, steps or a share, and decided in epochs."""

    def length(name: str, rule: float, reason: str) -> Decision[float]:
        found = choose(name, rule, reason)
        return replace(found, value=_epochs(found.value)) if isinstance(found.value, str) else found

    def _epochs(text: str) -> float:
        return in_epochs(text, epochs=epochs, steps_per_epoch=steps_per_epoch)

    schedule = choose("schedule", "wsd", "warm-up, stable, decay over the last fifth: can be extended and cooled down")
    decay = choose("decay", DECAY, "the last fifth")
    if isinstance(decay.value, str):
        decay = replace(decay, value=min(1.0, _epochs(decay.value) / epochs))
    asked: Decision[Any] = choose("milestones", [], "none")
    if isinstance(asked.value, str):
        asked = replace(asked, value=[_epochs(part) for part in asked.value.split(",")])
    return {
        "schedule": schedule,
        "warmup": length("warmup", _warmup(epochs), "5 % of the epochs, at most 5"),
        "decay": decay,
        "milestones": asked,
        "period": length("period", 0.0, "this schedule has none"),
        "gamma": choose("gamma", 0.1, "this schedule has none"),
        "lrf": choose("lrf", 0.0, "decay to zero"),
    }


def _learning_rates(
    choose: Chooser, optimizer: str, batch: int, pretrained: bool, measured: Measured | None
) -> tuple[Decision[float], Decision[float]]:
    """Peak rates of the backbone and of the head: by the table, or as a range test found them where that was asked for."""
    base = LR[optimizer]
    ratio = batch / BATCH
    factor, rule = (ratio, "linear") if optimizer == "sgd" else (math.sqrt(ratio), "square-root")
    scaled = f"{base:g} at batch 64, {rule} rule" if batch != BATCH else f"{base:g}, the guides' default"
    peak = _three_digits(base * factor)
    if pretrained:
        lr = choose("lr", _three_digits(peak * BACKBONE_LR), f"{BACKBONE_LR:g} of {scaled}: the backbone is pretrained")
    else:
        lr = choose("lr", peak, scaled)
    found = measured.lr_range if measured is not None else None
    if found is not None and not found.suggestion:
        lr = replace(lr, reason=f"{lr.reason}; {found.reason}")
    elif found is not None:
        old, lr = lr.value, Decision(found.suggestion, found.reason, "measured")
        if choose.base is not None and choose.request.head_lr is None:  # in the ratio of that plan, as they were tested
            return lr, replace(choose.base.head_lr, value=_three_digits(choose.base.head_lr.value * lr.value / old))
    if not pretrained:
        return lr, choose("head_lr", lr.value, "as the rest: nothing is pretrained")
    head = _three_digits(HEAD_LR * lr.value)
    return lr, choose("head_lr", head, f"{HEAD_LR:g} times the backbone's: the head is new")


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _warmup(epochs: int) -> float:
    return min(5.0, round(0.05 * epochs, 2))
