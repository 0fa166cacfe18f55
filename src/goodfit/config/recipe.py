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
from goodfit.config.schedules import PLANNED, choose_schedule, outlast_a_cycle
from goodfit.core.errors import RequestError

# At batch 64. RMSprop does not correct the bias of its average, so its first updates are ten times the rate: less than
# Adam's. (Digits, 8 epochs, training loss: 1.7 at 1e-4, 0.9 at 3e-4, 0.2 at 1e-3; AdamW at 1e-3 0.4.)
LR = {"adamw": 1e-3, "adam": 1e-3, "nadam": 1e-3, "radam": 1e-3, "rmsprop": 3e-4, "sgd": 0.05, "muon": 1e-3}
MOMENTUM = {"rmsprop": (0.0, "as Hinton gave it; its rate is for none"), "muon": (0.95, "as Jordan 2024")}
DECOUPLED = ("adamw", "nadam", "radam", "muon")
BACKBONE_LR = (
    0.3  # of the rate from scratch, where the backbone is pretrained (trashnet: 1.0 lost 4 points, see dev/LOG.md)
)
HEAD_LR = 10  # times the rate of a pretrained backbone
EPOCHS = 300
MOST_EPOCHS = 1200
SWA_EPOCHS = 2  # the least that make an average
ALL_BUT_HEAD = "all-but-head"  # of `freeze`
T = TypeVar("T")


def choose_recipe(choose: Chooser, facts: Facts, batch: int) -> dict[str, Decision[Any]]:
    """The decisions of this module, by their names in the plan.

    Args:
        batch: Samples per update.

    Raises:
        RequestError: what was asked does not fit together.
    """
    pretrained = facts.model.weights_kind != "none"
    optimizer = _optimizer(choose, facts)
    # Rates, decay and momentum of one kind of optimizer say nothing about another: a plan's hold for its own.
    fresh = choose.unless_changed("optimizer")
    lr, head_lr = _learning_rates(fresh, optimizer.value, batch, pretrained, facts.measured)
    head_lr = _known_head(choose, facts, lr, head_lr)
    lengths = _lengths(choose)
    steps_per_epoch = max(1, facts.data.num_train // batch)
    if lengths["time"].value and lengths["epochs"].source != "asked":
        _refuse_lengths(choose)
    decayed = optimizer.value in DECOUPLED
    patience = choose("patience", 50, "the guides' default; warm-up is not counted")
    schedule = choose_schedule(choose, lengths["epochs"].value, steps_per_epoch, patience.value)
    clip_value = choose("clip_value", 0.0, "the norm is limited, not single elements")
    return {
        **lengths,
        "optimizer": optimizer,
        "lr": lr,
        "head_lr": head_lr,
        **_transfer(choose, pretrained, lengths["epochs"].value, steps_per_epoch),
        "weight_decay": fresh("weight_decay", 0.01 if decayed else 1e-4,
                              "the guides' default for decoupled decay; none on norms and biases" if decayed else
                              "little, as it is part of the gradient here; none on norms and biases"),
        "momentum": _momentum(fresh, optimizer.value, schedule["schedule"].value),
        **schedule,
        "clip": choose("clip", 0.0 if clip_value.value else 1.0,
                       "single elements are limited instead" if clip_value.value else
                       "a guard against rare large gradients"),
        "clip_value": clip_value,
        **_averages(choose, lengths, schedule),
        "patience": outlast_a_cycle(patience, schedule),
        "min_delta": choose("min_delta", 0.001, "the guides' default, relative"),
    }  # fmt: skip


def _optimizer(choose: Chooser, facts: Facts) -> Decision[str]:
    """AdamW for every family of networks and every size of data: nothing that was measured here is better."""
    family = "attention" if facts.model.has_attention else "convolutions"
    start = "from scratch" if facts.model.weights_kind == "none" else "pretrained"
    why = "attention trains badly with SGD" if facts.model.has_attention else "steady over learning rates"
    return choose(
        "optimizer", "adamw", f"{family}, {start}, {facts.data.num_train:,} samples: AdamW in all cases, {why}"
    )


def _momentum(choose: Chooser, optimizer: str, schedule: str) -> Decision[float]:
    value, reason = MOMENTUM.get(optimizer, (0.9, "the usual value"))
    if schedule != "onecycle" or optimizer == "rmsprop":
        return choose("momentum", value, reason)
    if choose.request.momentum is not None:
        raise RequestError("one-cycle moves momentum itself, from 0.95 to 0.85 and back.", where="momentum=",
                           next="leave momentum out, or choose another schedule=")  # fmt: skip
    return Decision(0.95, "one-cycle moves it from 0.95 to 0.85 and back", "rule")


def _lengths(choose: Chooser) -> dict[str, Decision[Any]]:
    epochs = choose("epochs", EPOCHS, "a budget: early stopping ends the run when it stops improving")
    if epochs.source == "asked":
        most = Decision(epochs.value, "so many were asked for", "rule")
    else:
        most = choose(
            "most_epochs", MOST_EPOCHS, f"a run that still improves goes on to {2 * EPOCHS}, then {MOST_EPOCHS}"
        )
    return {"epochs": epochs, "most_epochs": most, "time": choose("time", 0.0, "no limit was asked for")}


def _refuse_lengths(choose: Chooser) -> None:
    """Refuse what is planned over a number of epochs that nobody knows: a time alone was asked for.

    Raises:
        RequestError: something of that kind was asked for.
    """
    asked = choose.request
    decision = choose("schedule", "wsd", "")
    found = []
    own = asked.period or asked.milestones  # in epochs, whatever their number
    if decision.value in PLANNED and not (isinstance(own, str) and "%" not in own):
        found.append(f"schedule={decision.value}")
    if asked.progressive is not None and asked.progressive < 1:
        found.append(f"progressive={asked.progressive:g}")
    if asked.unfreeze is not None and asked.unfreeze.strip().lower() not in ("never", "gradual"):
        found.append(f"unfreeze={asked.unfreeze}")
    if isinstance(asked.decay, str) and not asked.decay.endswith("%"):
        found.append(f"decay={asked.decay}")
    if found:
        raise RequestError(f"{' and '.join(found)}: planned over the run's epochs, and with time= alone nobody knows how many there will be.",
                           where=f"{found[0].partition('=')[0]}=", next="say epochs= too, as many as fit into the time, or leave it out")  # fmt: skip


def _averages(
    choose: Chooser, lengths: dict[str, Decision[Any]], schedule: dict[str, Decision[Any]]
) -> dict[str, Decision[Any]]:
    """The moving average of the weights, and stochastic weight averaging over the last part of the run.

    Raises:
        RequestError: the part is too short to average over, reaches into the warm-up, or meets a decay that was asked for.
    """
    epochs = lengths["epochs"].value
    ema = choose("ema", True, "the average of the last steps validates better than the last step")
    swa = choose("swa", 0.0, "the moving average does the same")
    if not swa.value:
        return {"ema": ema, "swa": swa}
    length = round(swa.value * epochs)
    wsd = schedule["schedule"].value == "wsd"
    asked = [name for name in ("decay", "lrf") if wsd and getattr(choose.request, name) is not None]
    problem = ""
    if length < SWA_EPOCHS:
        problem = f"{swa.value:g} of {epochs} epochs is {length}, and an average needs {SWA_EPOCHS}"
    elif epochs - length < schedule["warmup"].value:
        problem = f"its {length} epochs would begin before the warm-up of {schedule['warmup'].value:g} has ended"
    elif lengths["time"].value:
        problem = "a time budget moves the end of the run, before which it would begin"
    elif asked:
        problem = f"the average takes the place of wsd's decay, so {asked[0]}= cannot be used"
    if problem:
        raise RequestError(f"swa={swa.value:g}: {problem}.", next="use another share, or swa=0")
    if choose.request.swa is not None:
        rate = "without wsd's decay" if wsd else "at the rate reached by then"
        swa = replace(swa, reason=f"{swa.reason}: equal average of the epochs in this last share, {rate}, batch norm anew"
                      f"{'; ends the moving average' if ema.value else ''}")  # fmt: skip
    return {"ema": ema, "swa": swa}


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
