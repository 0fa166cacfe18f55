"""The one place that knows processors: which there are, and how to move, seed and autocast on them."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from goodfit.config.facts import MachineFacts
from goodfit.core.errors import RequestError
from goodfit.core.machine import num_cores
from goodfit.core.places import cache_folder, free_bytes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_machine(asked: str | None) -> MachineFacts:
    """The device that will train, and what the plan needs to know about the machine.

    Raises:
        RequestError: the asked device does not exist here, or is of a kind that is not supported.
    """
    import psutil

    if asked is None:
        name, reason = _best_device()
    else:
        name, reason = _asked_device(asked), "asked for"
    return MachineFacts(
        device=name.split(":")[0] if name != "cpu" else "cpu",
        device_reason=reason,
        device_name=_device_name(name),
        native_bf16=_native_bf16(name),
        num_cores=num_cores(),
        free_memory=int(psutil.virtual_memory().available),
        free_disk=free_bytes(cache_folder()),
    )


def _best_device() -> tuple[str, str]:
    if torch.cuda.is_available():
        return "cuda", "a CUDA GPU is there"
    if torch.backends.mps.is_available():
        return "mps", "an Apple GPU is there"
    return "cpu", "no GPU was found"


def _asked_device(asked: str) -> str:
    name = f"cuda:{asked}" if asked.isdigit() else asked.lower()
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise RequestError(f"device={asked}: this kind of device is not supported.", next="use cpu, cuda or mps")
    number = name.partition(":")[2]
    if kind == "cuda" and (not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count()):
        raise RequestError(f"device={asked}: torch sees {torch.cuda.device_count()} CUDA GPUs here.",
                           next="use device=cpu, or install a torch build for your GPU driver")  # fmt: skip
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RequestError("device=mps: there is no Apple GPU here.", next="use device=cpu")
    if kind == "cuda" and number not in ("", "0"):
        raise RequestError("One GPU is chosen by its environment variable, so that every library agrees.",
                           next=f"CUDA_VISIBLE_DEVICES={number} goodfit train ... device=cuda")  # fmt: skip
    return kind


def _device_name(name: str) -> str:
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(0)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _native_bf16(name: str) -> bool:
    if name.startswith("cuda"):
        return torch.cuda.get_device_capability(0) >= (8, 0)
    if name == "cpu":
        try:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_bf16_instructions()
        except (AttributeError, RuntimeError):
            return False
    return False


def _has_bf16_instructions() -> bool:
    """AVX-512 BF16 or AMX: without them oneDNN emulates bf16, which is slower than fp32."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None) or getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(check()) if check is not None else False


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePolicy:
    """How batches and models meet a device: precision, memory format, seeds."""

    kind: str
    precision: str
    channels_last: bool

    @property
    def torch_device(self) -> torch.device:
        """The device as torch's type."""
        return torch.device(self.kind)

    @property
    def scales_loss(self) -> bool:
        """fp16 gradients underflow without a loss scale."""
        return self.precision == "fp16"

    @property
    def reads_are_free(self) -> bool:
        """Whether reading a tensor's value on the host waits for nothing: true on the CPU."""
        return self.kind == "cpu"

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move a model to the device, in the planned memory format; its weights stay float32."""
        if self.channels_last:
            return model.to(self.torch_device, memory_format=torch.channels_last)
        return model.to(self.torch_device)

    def move(self, data: Any) -> Any:
        """Move every tensor of a nested batch to the device."""
        if isinstance(data, torch.Tensor):
            return data.to(self.torch_device, non_blocking=True)
        if isinstance(data, dict):
            return {key: self.move(value) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return type(data)(self.move(value) for value in data)
        return data

    def autocast(self) -> AbstractContextManager[Any]:
        """Run the forward pass in the planned precision."""
        return torch.autocast(self.kind, dtype=_DTYPES[self.precision], enabled=self.precision != "fp32")

    def seed(self, seed: int) -> None:
        """Seed what is random inside the model (dropout, drop-path) on this device."""
        torch.default_generator.manual_seed(seed)
        if self.kind == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.kind == "mps":
            torch.mps.manual_seed(seed)

    def peak_memory(self) -> int:
        """Largest memory of the device taken so far, bytes; on the CPU, of this process."""
        if self.kind == "cuda":
            return int(torch.cuda.max_memory_allocated())
        import sys

        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
