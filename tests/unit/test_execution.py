"""Which ways to execute a step are tried, and what is decided and said about compiling, tf32, the allocator and slow requests."""

import json
from dataclasses import replace

import pytest

from goodfit.cli.arguments import split_words
from goodfit.config.execution import COMPILE_PAYS, modes_to_try, unwise, ways_to_execute
from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.measured import AllocatorCost, BatchCost, Measured, StepCost, best_execution
from goodfit.config.plan import read_plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve
from goodfit.core.errors import RequestError
from goodfit.watch.terminal import Terminal
from plans import plan_of

CPU = MachineFacts(device="cpu", device_reason="", device_name="a CPU", native_bf16=True, num_cores=2,
                   free_memory=16 * 10**9, has_mallopt=True)  # fmt: skip
GPU = replace(CPU, device="cuda", device_name="a GPU", has_mallopt=False)
PLAIN = StepCost(precision="fp32", channels_last=False, seconds=0.2)
HALF = StepCost(precision="bf16", channels_last=True, seconds=0.1, gradient_gap=0.004)
COMPILED = replace(HALF, compile="default", seconds=0.07, compile_seconds=26.0)


def decide(machine=CPU, measured=None, base=None, **asked):
    data = DataFacts(format="folders", format_reason="", num_train=1280, num_val=200, num_test=200, num_classes=6,
                     smallest_class=90, largest_class=160, median_side=512, grey_share=0.0, given_splits=(),
                     decode_seconds=0.002, pixel_bytes_at=9.0)  # fmt: skip
    model = ModelFacts(name="resnet18.a1_in1k", num_parameters=11_000_000, native_imgsz=224, stride=1, mean=(0, 0, 0),
                       std=(1, 1, 1), interpolation="bicubic", crop_share=0.875, weights="", weights_kind="none",
                       weights_problem="", licence="", has_drop_path=False)  # fmt: skip
    return resolve(TrainRequest(**asked), Facts(data=data, machine=machine, model=model, measured=measured), base)


def test_tf32_is_tried_where_the_gpu_has_it_and_refused_elsewhere():
    ways = ways_to_execute(plan_of(cuda=True), GPU)
    assert ways[0] == ("fp32", False) and sorted(ways) == [
        (p, last) for p in ("bf16", "fp32", "tf32") for last in (False, True)
    ]
    assert {p for p, _ in ways_to_execute(plan_of(cuda=True), replace(GPU, native_bf16=False))} >= {"fp32", "fp16"}
    assert all(p != "tf32" for machine in (CPU, replace(CPU, native_bf16=False), replace(GPU, native_bf16=False))
               for p, _ in ways_to_execute(plan_of(precision="fp32"), machine))  # fmt: skip
    assert decide(GPU, precision="tf32").precision.value == "tf32"
    for machine in (CPU, replace(GPU, native_bf16=False), replace(CPU, device="mps")):
        with pytest.raises(RequestError, match="tf32"):
            decide(machine, precision="tf32")
    with pytest.raises(RequestError, match="CUDA"):
        decide(CPU, compile="reduce-overhead")


def test_compiling_is_tried_where_it_can_pay_or_was_asked_for():
    free, long = plan_of(), COMPILE_PAYS + 1
    assert modes_to_try(free, CPU, long) == ["default"]
    assert modes_to_try(free, GPU, long) == ["default", "reduce-overhead"]
    assert modes_to_try(free, CPU, COMPILE_PAYS - 1) == []
    assert modes_to_try(plan_of(compile="default"), CPU, 1.0) == ["default"]
    assert modes_to_try(plan_of(compile="off"), CPU, long) == modes_to_try(plan_of(deterministic=True), CPU, long) == []


def test_compiling_must_pay_within_the_run():
    ways = [PLAIN, HALF, COMPILED]
    assert best_execution(ways, 100_000) is COMPILED
    assert best_execution(ways, 700) is HALF  # 70 s against 49 + 26
    assert best_execution([PLAIN, HALF, replace(COMPILED, seconds=0.097)], 10**6) is HALF  # 3 % is not worth it
    assert best_execution([PLAIN, HALF, replace(COMPILED, gradient_gap=0.6)], 100_000) is HALF


def test_the_plan_says_what_compiling_gave():
    found = Measured(batch=64, steps=(PLAIN, HALF, COMPILED))
    plan = decide(measured=found)  # 300 epochs of 20 steps
    assert (plan.compile.value, plan.compile.source) == ("default", "measured")
    assert plan.compile.reason == "default: 1.43 × the eager speed, 26 s to compile"
    assert "bf16" in plan.precision.reason
    short = decide(measured=found, epochs=10)
    assert (short.compile.value, short.compile.source) == ("off", "measured") and "26 s" in short.compile.reason
    failed = replace(found, steps=(PLAIN, HALF, replace(COMPILED, seconds=0.0, problem="no C++ compiler")))
    assert (
        decide(measured=failed).compile.value == "off" and "no C++ compiler" in decide(measured=failed).compile.reason
    )
    asked = decide(measured=failed, compile="default")
    assert (asked.compile.value, asked.compile.source, asked.precision.value) == ("default", "asked", "bf16")
    assert Measured.from_dict(found.to_dict()) == found


def test_freed_memory_is_kept_unless_that_is_slower():
    def allocator(ratio, machine=CPU):
        return decide(
            machine, Measured(batch=64, allocator=AllocatorCost(keep=0.1, system=0.1 * ratio, ratio=ratio))
        ).allocator

    assert allocator(1.031).value == "keep" and allocator(1.031).source == "measured"
    assert allocator(1.031).reason == "freed memory is kept: 1.03 × as fast (interleaved)"
    assert allocator(0.985).value == "keep" and allocator(0.97).value == "system"
    assert allocator(1.5, GPU).value == "system" and decide().allocator.source == "rule"


def test_one_warning_with_the_measured_cost_for_each_slow_request(capsys):
    sizes = tuple(BatchCost(batch=b, seconds=b / rate, memory=10**9) for b, rate in ((16, 50), (32, 80), (64, 100)))
    found = Measured(batch=64, steps=(PLAIN, HALF), batches=sizes, memory=8 * 10**9)
    assert unwise(decide(measured=found)) == unwise(decide(measured=found, batch=64, precision="bf16")) == []
    assert unwise(decide(measured=found, precision="fp32")) == [
        "precision=fp32: asked for; bf16 + channels-last would be 2.0 times as fast here"
    ]
    assert unwise(decide(measured=found, batch=16)) == ["batch=16: asked for; 64 would be 2.0 times as fast here"]
    assert decide(measured=found, batch=16).batch.value == 16
    slow = replace(found, steps=(PLAIN, HALF, replace(COMPILED, seconds=0.13)))
    (text,) = unwise(decide(measured=slow, compile="default"))
    assert text == "compile=default: asked for; bf16 + channels-last would be 1.3 times as fast here"
    Terminal()({"event": "warning", "text": text})
    assert capsys.readouterr().err.split() == ["warning", *text.split()]


def test_a_plan_that_was_printed_is_run_exactly(tmp_path):
    found = Measured(batch=64, steps=(PLAIN, HALF, COMPILED), allocator=AllocatorCost(keep=0.1, system=0.09, ratio=0.9))
    made = decide(measured=found, lr=0.002)
    (tmp_path / "plan.json").write_text(json.dumps(made.to_dict(), ensure_ascii=False) + "\n")  # as json=true prints it
    for words in (["DATA", "--plan", "plan.json"], ["DATA", "plan=plan.json"], ["DATA", "--plan=plan.json"]):
        assert split_words(words) == (["DATA"], {"plan": "plan.json"})
    again = decide(base=read_plan(tmp_path / "plan.json"))
    assert {n: d.value for n, d in again.decisions().items()} == {n: d.value for n, d in made.decisions().items()}
    assert (again.compile.value, again.allocator.value, again.precision.value) == ("default", "system", "bf16")
    assert again.measured == made.measured and again.compile.reason == made.compile.reason
