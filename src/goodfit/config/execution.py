"""How a plan is executed: batch, precision, memory format, cache and workers, by rule or as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from goodfit.config.chooser import Chooser
from goodfit.config.facts import DataFacts, Facts, MachineFacts
from goodfit.config.loading import best_loading, explain_loading, unwise_loading
from goodfit.config.measured import (
    ALLOCATOR_LOSS,
    WORTHWHILE,
    Measured,
    StepCost,
    best_batch,
    best_execution,
    explain_batch,
    explain_compile,
    explain_execution,
)
from goodfit.config.plan import Decision, Plan
from goodfit.config.sizes import InputSizes
from goodfit.config.study import choose_studied
from goodfit.config.time_rules import KEPT_PASSES, passes_in
from goodfit.core.errors import RequestError

BATCH = 64
UNWISE = "asked for; "  # begins the reason of what was asked and is slow
MIN_BATCH = 16
MIN_STEPS_PER_EPOCH = 20
PREFETCH = 2
MUCH_FASTER = 1.2  # times as fast, from which something asked for is worth a warning
ITEM_SECONDS = 1e-3  # that one sample of a user's dataset takes, from which loader processes pay
COMPILE_PAYS = 1800.0  # projected seconds of a run from which compiling is measured
CACHE_SECONDS = 30.0  # of decoding, from which a cache is worth a file


def choose_batch(choose: Chooser, facts: Facts) -> tuple[Decision[int], Decision[int]]:
    """Samples per update, and in how many parts: as studied, else as measured, else by rule.

    Raises:
        RequestError: what was asked does not fit together.
    """
    data, measured = facts.data, facts.measured
    found = best_batch(measured.batches, measured.memory) if measured is not None else None
    timed = not choose.request.deterministic
    studied = choose_studied(measured.study, measured.rates(), within=WORTHWHILE, timed=timed) if measured else None
    if studied is not None:
        batch = choose("batch", *studied, "measured")
    elif measured is not None and found is not None:
        batch = choose("batch", found.batch, explain_batch(measured.batches, found, measured.memory), "measured")
    else:
        batch = choose("batch", usual_batch(data.num_train), _batch_reason(data.num_train))
    if measured is not None and batch.source == "asked":
        batch = told_if_slow(batch, measured)
    if measured is not None and measured.study_problem:
        batch = replace(batch, reason=f"{batch.reason}; batch=study was not done: {measured.study_problem}")
    accumulate = choose("accumulate", 1, "the batch fits at once")
    _check_batch(batch, accumulate, data)
    return batch, accumulate


def told_if_slow(batch: Decision[int], measured: Measured) -> Decision[int]:
    """What was asked stays, with what it costs where another size is at least a fifth faster."""
    asked = next((b for b in measured.batches if b.batch == batch.value and b.seconds), None)
    best = best_batch(measured.batches, measured.memory)
    if asked is None or best is None or best.rate < MUCH_FASTER * asked.rate:
        return batch
    return replace(batch, reason=f"{UNWISE}{best.batch} would be {best.rate / asked.rate:.1f} times as fast here")


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
    return (
        f"{num_train:,} training samples: {num_train // size} updates an epoch rather than {num_train // BATCH} at 64"
    )


def _check_batch(batch: Decision[int], accumulate: Decision[int], data: DataFacts) -> None:
    if accumulate.value > batch.value:
        raise RequestError(f"accumulate={accumulate.value} needs a batch of at least as many samples, not {batch.value}.",
                           next="lower accumulate or raise batch")  # fmt: skip
    if batch.value > data.num_train:
        raise RequestError(
            f"batch={batch.value} is larger than the training split of {data.num_train} samples.",
            next=f"use batch={data.num_train} or less",
        )


def _cache(choose: Chooser, facts: Facts, side: int, inputs: InputSizes) -> Decision[str]:
    """Where decoded training pictures are kept, by what decoding costs and where there is room.

    Memory, if decoding all of them again at the next run costs little; else the disk, where the next run finds them.

    Args:
        side: Input size that they are kept for, pixels.
    """
    data, machine, time = facts.data, facts.machine, choose.request.time
    if data.task == "module":
        return Decision("off", "not a folder of images", "rule")
    largest = 3.0 * data.median_side**2  # pictures are kept reduced, never enlarged
    size = data.num_train * min(data.pixel_bytes_at * side**2, largest)
    seconds = data.num_train * data.decode_seconds / machine.num_cores
    in_memory, on_disk = size <= 0.25 * machine.free_memory, size <= 0.25 * machine.free_disk
    if inputs.epochs == 1:
        value, why = "off", "each picture is used once"
    elif (
        time
        and facts.first_step is not None
        and (passes := passes_in(time, facts.first_step, inputs.imgsz, data.num_train)) < KEPT_PASSES
    ):
        value, why = "off", f"the time holds about {passes:.2g} passes over them"
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


def choose_execution(choose: Chooser, facts: Facts, inputs: InputSizes, scale: float) -> dict[str, Any]:
    """Precision, memory format, device, threads, cache and loader processes, by their names in the plan.

    Args:
        inputs: The sizes of training.
        scale: The zoom of the augmentation, for which pictures keep more detail.
    """
    machine = facts.machine
    precision, channels_last, compiled = _arithmetic(choose, facts, inputs)
    return {
        "precision": precision,
        "channels_last": channels_last,
        "compile": compiled,
        "allocator": _allocator(choose, machine, facts.measured),
        "device": Decision(machine.device, machine.device_reason, "asked" if choose.request.device else "rule"),
        "threads": choose("threads", machine.num_cores, f"{machine.num_cores} cores"),
        **_loading(choose, facts, _cache(choose, facts, inputs.kept_for(scale), inputs)),
    }  # fmt: skip


def _loading(choose: Chooser, facts: Facts, cache: Decision[str]) -> dict[str, Any]:
    """Cache, loader processes and batches ahead: what an update waits for data, where that was measured, else by rule."""
    cores, costs = facts.machine.num_cores, facts.measured.loading if facts.measured is not None else ()
    off, many = cache.value == "off", min(8, max(1, cores - 1))
    if facts.data.task == "module":
        slow = facts.data.decode_seconds >= ITEM_SECONDS
        workers = choose("workers", many if slow else 0, f"{1e3 * facts.data.decode_seconds:.2g} ms a sample: "
                         f"loaded {'beside the model' if slow else 'as it goes'}")  # fmt: skip
    else:
        workers = choose("workers", many if off else 0,
                         "decoding runs beside the model" if off else "the cache makes them needless")  # fmt: skip
    prefetch = choose("prefetch", PREFETCH, "one that is used and one that is made")
    best = best_loading(costs, cache=cache.value, workers=workers.value if workers.source == "asked" else None,
                        prefetch=prefetch.value if prefetch.source == "asked" else None)  # fmt: skip
    if best is None:
        return {"cache": cache, "workers": workers, "prefetch": prefetch}
    why = explain_loading(costs, best, num_cores=cores)
    workers = choose("workers", best.workers, why, "measured")
    if best.workers:
        prefetch = choose("prefetch", best.prefetch, "as measured with workers", "measured")
    if choose.base is not None:
        return {"cache": cache, "workers": workers, "prefetch": prefetch}
    if workers.source == "asked" and (loss := unwise_loading(costs, best, of="workers")):
        workers = replace(workers, reason=f"asked for; {loss}")
    if cache.source == "asked" and (loss := unwise_loading(costs, best, of="cache")):
        cache = replace(cache, reason=f"asked for; {loss}")
    return {"cache": cache, "workers": workers, "prefetch": prefetch}


def _allocator(choose: Chooser, machine: MachineFacts, measured: Measured | None) -> Decision[str]:
    """Whether freed memory is kept for the next step: yes, unless it is measured slower by more than 2 %.

    A change that needed another process, as jemalloc does, would have to gain 5 %. This one is made in the running
    process and costs 5 % more memory held, so it has to gain nothing to be taken: it only must not lose.
    """
    if not machine.has_mallopt:
        return choose("allocator", "system", "this C library has no such setting")
    found = measured.allocator if measured is not None else None
    if found is None or not found.ratio:
        why = "freed memory is kept for the next step: fewer page faults, 5 % more memory held"
        return choose("allocator", "keep", why)
    keep = found.ratio >= 1 - ALLOCATOR_LOSS
    text = f"freed memory is {'kept' if keep else 'not kept, which was'}: {found.ratio:.2f} × as fast (interleaved)"
    return choose("allocator", "keep" if keep else "system", text, "measured")


def _arithmetic(
    choose: Chooser, facts: Facts, inputs: InputSizes
) -> tuple[Decision[str], Decision[bool], Decision[str]]:
    """Precision, memory format and compiling: what takes the least time in this run and agrees with fp32, where it was
    measured; else what usually does.

    Raises:
        RequestError: this device does not have what was asked for.
    """
    machine, measured = facts.machine, facts.measured
    own = facts.data.task == "module"
    if own:
        usual = ("fp32", "an own module: less only where it was measured to agree, or is asked for")
    elif machine.device == "cuda":
        usual = ("bf16", "this GPU has it") if machine.native_bf16 else ("fp16", "this GPU has no bf16")
    elif machine.device == "cpu" and machine.native_bf16:
        usual = ("bf16", "this CPU has bf16 instructions: twice the convolution speed of fp32")
    else:
        usual = ("fp32", "no fast half precision on this device")
    last = machine.device != "mps" and not own
    precision = choose("precision", *usual)
    channels_last = choose(
        "channels_last", last, "faster convolutions" if last else "left as it is" if own else "slower on this device"
    )
    compiled = choose("compile", "off", "compiling takes time at the start of every run: not measured where that is short"
                      if not inputs.varies else "inputs of several sizes would each be compiled anew")  # fmt: skip
    _check_device(machine, precision.value, compiled.value)
    _check_compile(compiled.value, inputs)
    steps = measured.steps if measured is not None else ()
    if inputs.varies:
        steps = tuple(s for s in steps if s.compile == "off")
    updates = inputs.epochs * max(1, facts.data.num_train // measured.batch) if measured is not None else 1
    kept = matching(steps, precision, channels_last)
    best = best_execution([s for s in kept if compiled.source != "asked" or s.compile == compiled.value], updates)
    best = best or best_execution([s for s in kept if s.compile == "off"], updates)  # the asked compiling did not work
    if best is None:
        return precision, channels_last, compiled
    why = explain_execution(steps, best)
    free = precision.source != "asked"
    if free:
        precision = choose("precision", best.precision, why, "measured")
    if channels_last.source != "asked":
        channels_last = choose("channels_last", best.channels_last, why if not free else
                               f"with precision, {1e3 * best.seconds:.0f} ms a step", "measured")  # fmt: skip
    if figures := explain_compile(steps):
        compiled = choose("compile", best.compile, figures, "measured")
        if compiled.source == "asked":
            compiled = replace(compiled, reason=f"asked for: {figures}")
    return _warned(precision, channels_last, compiled, steps, best, updates)


def _check_device(machine: MachineFacts, precision: str, compiled: str) -> None:
    if precision == "tf32" and not (machine.device == "cuda" and machine.native_bf16):
        raise RequestError(f"precision=tf32: {machine.device_name} has no such arithmetic; it came with NVIDIA's Ampere GPUs.",
                           next="use precision=fp32, or leave precision out")  # fmt: skip
    if compiled == "reduce-overhead" and machine.device != "cuda":
        raise RequestError(
            "compile=reduce-overhead records CUDA graphs, and so needs a CUDA GPU.", next="use compile=default"
        )


def _check_compile(compiled: str, inputs: InputSizes) -> None:
    if compiled != "off" and inputs.varies:
        raise RequestError(
            f"compile={compiled} makes a kernel for every input size, and multi_scale= or progressive= give the run "
            f"sizes from {inputs.smallest} to {inputs.largest} pixels: each would take as long to compile as the first.",
            where="compile=", next="use compile=off, or one size: multi_scale=0 and progressive=1",
        )  # fmt: skip


def pays_to_compile(seconds: float) -> bool:
    """Whether compiling may pay in a run of so many seconds: half an hour or more.

    Compiling resnet18 takes 26 s on two cores. To find out what it gains costs as much again and is given a minute, a
    thirtieth of half an hour; a gain of 30 % would save seven minutes of it.
    """
    return seconds >= COMPILE_PAYS


def ways_to_execute(plan: Plan, machine: MachineFacts) -> list[tuple[str, bool]]:
    """Precision and memory format, plain fp32 first; half precision only where the hardware has it."""
    lower = ["bf16"] if machine.native_bf16 else ["fp16"] if machine.device == "cuda" else []
    if machine.device == "cuda" and machine.native_bf16:  # both came with the same generation of GPUs
        lower = ["tf32", *lower]
    ways = [("fp32", False), ("fp32", True), *((p, last) for p in lower for last in (True, False))]
    asked = (plan.precision.value, plan.channels_last.value)
    return ways if asked in ways else [*ways, asked]


def modes_to_try(plan: Plan, machine: MachineFacts, projected: float) -> list[str]:
    """The modes of torch.compile to measure, on the best eager way: the one that was asked for, so that its cost can be
    said; else all, if a run of so many seconds is long enough for a gain to pay. Timings never decide on compiling,
    which changes the arithmetic, where a run must repeat; gradual unfreezing would compile at every layer anew."""
    if InputSizes.of(plan).varies:  # each size would be compiled anew
        return []
    if plan.compile.source == "asked":
        return [plan.compile.value] if plan.compile.value != "off" else []
    if plan.deterministic.value or not pays_to_compile(projected) or plan.unfreeze.value == "gradual":
        return []
    return ["default", "reduce-overhead"] if machine.device == "cuda" else ["default"]


def matching(steps: Sequence[StepCost], precision: Decision[str], channels_last: Decision[bool]) -> list[StepCost]:
    """The ways that keep what was asked for."""
    return [
        step
        for step in steps
        if (precision.source != "asked" or step.precision == precision.value)
        and (channels_last.source != "asked" or step.channels_last == channels_last.value)
    ]


def _warned(
    precision: Decision[str], channels_last: Decision[bool], compiled: Decision[str], steps: Sequence[StepCost],
    taken: StepCost, updates: int,
) -> tuple[Decision[str], Decision[bool], Decision[str]]:  # fmt: skip
    """What was asked stays, with what it costs where something else is at least a fifth faster."""
    best = best_execution(steps, updates)
    if best is None or best.total(updates) * MUCH_FASTER > taken.total(updates):
        return precision, channels_last, compiled
    ratio = taken.total(updates) / best.total(updates)
    cost = f"{UNWISE}{best.name} would be {ratio:.1f} times as fast here"
    if precision.source == "asked" and precision.value != best.precision:
        return replace(precision, reason=cost), channels_last, compiled
    if channels_last.source == "asked" and channels_last.value != best.channels_last:
        return precision, replace(channels_last, reason=cost), compiled
    if compiled.source == "asked" and compiled.value != best.compile:
        return precision, channels_last, replace(compiled, reason=cost)
    return precision, channels_last, compiled


def unwise(plan: Plan) -> list[str]:
    """One line for each value that was asked for although something measured here is at least 1.2 times as fast."""
    asked = {name: d for name, d in plan.decisions().items() if d.source == "asked" and d.reason.startswith(UNWISE)}
    return [
        f"{name}={str(d.value).lower() if isinstance(d.value, bool) else d.value}: {d.reason}"
        for name, d in asked.items()
    ]
