"""How a plan is executed: batch, precision, memory format, cache and workers, by rule or as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from goodfit.config.chooser import Chooser
from goodfit.config.facts import DataFacts, Facts, MachineFacts
from goodfit.config.measured import Measured, StepCost, best_batch, best_execution, explain_batch, explain_execution
from goodfit.config.plan import Decision
from goodfit.core.errors import RequestError

BATCH = 64
MIN_BATCH = 16
MIN_STEPS_PER_EPOCH = 20
CACHE_SECONDS = 30.0  # of decoding, from which a cache is worth a file


def choose_batch(choose: Chooser, facts: Facts) -> tuple[Decision[int], Decision[int]]:
    """Samples per update, and in how many parts: as measured, else by rule.

    Raises:
        RequestError: what was asked does not fit together.
    """
    data, measured = facts.data, facts.measured
    found = best_batch(measured.batches, measured.memory) if measured is not None else None
    if measured is not None and found is not None:
        batch = choose("batch", found.batch, explain_batch(measured.batches, found, measured.memory), "measured")
    else:
        batch = choose("batch", usual_batch(data.num_train), _batch_reason(data.num_train))
    accumulate = choose("accumulate", 1, "the batch fits at once")
    _check_batch(batch, accumulate, data)
    return batch, accumulate


def batch_candidates(num_train: int) -> tuple[int, ...]:
    """Powers of two from 16 to 1,024 that leave at least 20 updates an epoch; at least one."""
    most = max(MIN_BATCH, num_train // MIN_STEPS_PER_EPOCH)
    return tuple(size for size in (16, 32, 64, 128, 256, 512, 1024) if size <= min(most, num_train)) or (num_train,)


def usual_batch(num_train: int) -> int:
    """64, or less where an epoch would have fewer than 20 updates; a power of two, at least 16."""
    size = BATCH
    while size > MIN_BATCH and num_train // size < MIN_STEPS_PER_EPOCH:
        size //= 2
    return min(size, num_train)


def _batch_reason(num_train: int) -> str:
    size = usual_batch(num_train)
    if size == BATCH:
        return "the guides' default"
    return f"{num_train:,} training images: {num_train // size} updates an epoch rather than {num_train // BATCH} at 64"


def _check_batch(batch: Decision[int], accumulate: Decision[int], data: DataFacts) -> None:
    if accumulate.value > batch.value:
        raise RequestError(f"accumulate={accumulate.value} needs a batch of at least as many samples, not {batch.value}.",
                           next="lower accumulate or raise batch")  # fmt: skip
    if batch.value > data.num_train:
        raise RequestError(
            f"batch={batch.value} is larger than the training split of {data.num_train} images.",
            next=f"use batch={data.num_train} or less",
        )


def _cache(choose: Chooser, facts: Facts, imgsz: int, epochs: int) -> Decision[str]:
    """Where decoded training pictures are kept, by what decoding costs and where there is room.

    Memory, if decoding all of them again at the next run costs little; else the disk, where the next run finds them.
    """
    data, machine = facts.data, facts.machine
    largest = 3.0 * data.median_side**2  # pictures are kept reduced, never enlarged
    size = data.num_train * min(data.pixel_bytes_at * imgsz**2, largest)
    seconds = data.num_train * data.decode_seconds / machine.num_cores
    in_memory, on_disk = size <= 0.25 * machine.free_memory, size <= 0.25 * machine.free_disk
    if epochs == 1:
        value, why = "off", "each picture is used once"
    elif in_memory and (seconds <= CACHE_SECONDS or not on_disk):
        value, why = "ram", f"decoding again at the next run takes {seconds:.0f} s"
    elif on_disk:
        value, why = "disk", f"decoding takes {seconds:.0f} s, which the next run saves"
    else:
        value, why = "off", "they fit neither into memory nor onto the disk"
    decision = choose("cache", value,
                      f"{1e3 * data.decode_seconds:.1f} ms to decode one, {size / 1e6:,.1f} MB in all, "
                      f"{machine.free_memory / 1e9:.0f} GB memory and {machine.free_disk / 1e9:.0f} GB disk free: {why}")  # fmt: skip
    return Decision(decision.value, decision.reason, "measured") if decision.source == "rule" else decision


def choose_execution(choose: Chooser, facts: Facts, imgsz: int, epochs: int) -> dict[str, Any]:
    """Precision, memory format, device, threads, cache and loader processes, by their names in the plan."""
    machine = facts.machine
    precision, channels_last = _arithmetic(choose, machine, facts.measured)
    cache = _cache(choose, facts, imgsz, epochs)
    workers = min(8, max(1, machine.num_cores - 1))
    return {
        "precision": precision,
        "channels_last": channels_last,
        "device": Decision(machine.device, machine.device_reason, "asked" if choose.request.device else "rule"),
        "threads": choose("threads", machine.num_cores, f"{machine.num_cores} cores"),
        "cache": cache,
        "workers": choose(
            "workers",
            workers if cache.value == "off" else 0,
            "decoding runs beside the model" if cache.value == "off" else "the cache makes them needless",
        ),
    }  # fmt: skip


def _arithmetic(
    choose: Chooser, machine: MachineFacts, measured: Measured | None
) -> tuple[Decision[str], Decision[bool]]:
    """Precision and memory format: the fastest that agrees with fp32, where it was measured; else what usually is."""
    if machine.device == "cuda":
        usual = ("bf16", "this GPU has it") if machine.native_bf16 else ("fp16", "this GPU has no bf16")
    elif machine.device == "cpu" and machine.native_bf16:
        usual = ("bf16", "this CPU has bf16 instructions: twice the convolution speed of fp32")
    else:
        usual = ("fp32", "no fast half precision on this device")
    last = machine.device != "mps"
    precision = choose("precision", *usual)
    channels_last = choose("channels_last", last, "faster convolutions" if last else "slower on this device")
    steps = measured.steps if measured is not None else ()
    free = {"precision": precision.source != "asked", "channels_last": channels_last.source != "asked"}
    best = best_execution(matching(steps, precision, channels_last))
    if best is None:
        return precision, channels_last
    why = explain_execution(steps, best)
    if free["precision"]:
        precision = choose("precision", best.precision, why, "measured")
    if free["channels_last"]:
        channels_last = choose("channels_last", best.channels_last, why if not free["precision"] else
                               f"with precision, {1e3 * best.seconds:.0f} ms a step", "measured")  # fmt: skip
    return _warned(precision, channels_last, steps, best)


def matching(steps: Sequence[StepCost], precision: Decision[str], channels_last: Decision[bool]) -> list[StepCost]:
    """The ways that keep what was asked for."""
    return [
        step
        for step in steps
        if (precision.source != "asked" or step.precision == precision.value)
        and (channels_last.source != "asked" or step.channels_last == channels_last.value)
    ]


def _warned(
    precision: Decision[str], channels_last: Decision[bool], steps: Sequence[StepCost], taken: StepCost
) -> tuple[Decision[str], Decision[bool]]:
    """What was asked stays, with what it costs where something else is at least a fifth faster."""
    best = best_execution(steps)
    if best is None or best.seconds * 1.2 > taken.seconds:
        return precision, channels_last
    cost = f"asked for; {best.name} would be {taken.seconds / best.seconds:.1f} times as fast here"
    if precision.source == "asked":
        return replace(precision, reason=cost), channels_last
    return precision, replace(channels_last, reason=cost)
