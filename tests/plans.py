"""A plan without a dataset, for tests of what is computed from plans."""

from __future__ import annotations

from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve


def facts_of(*, cuda: bool = False) -> Facts:
    """1,000 training photos and resnet18 from scratch on two cores, or a GPU."""
    data = DataFacts(format="folders", format_reason="", num_train=1000, num_val=200, num_test=200, num_classes=6,
                     smallest_class=90, largest_class=160, median_side=512, grey_share=0.0, given_splits=(),
                     decode_seconds=0.002, pixel_bytes_at=9.0)  # fmt: skip
    machine = MachineFacts(device="cuda" if cuda else "cpu", device_reason="", device_name="x", native_bf16=True,
                           num_cores=2, free_memory=16 * 10**9)  # fmt: skip
    model = ModelFacts(name="resnet18.a1_in1k", num_parameters=11_000_000, native_imgsz=224, stride=1, mean=(0, 0, 0),
                       std=(1, 1, 1), interpolation="bicubic", crop_share=0.875, weights="", weights_kind="none",
                       weights_problem="", licence="", has_drop_path=False)  # fmt: skip
    return Facts(data=data, machine=machine, model=model)


def plan_of(*, cuda: bool = False, **asked) -> Plan:
    """The plan for `facts_of`; anything can be asked for."""
    return resolve(TrainRequest(**asked), facts_of(cuda=cuda))
