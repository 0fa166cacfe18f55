"""The one place that knows processors: which there are, and how to move, seed and autocast on them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from goodfit.config.facts import MachineFacts
from goodfit.core.errors import RequestError
from goodfit.core.machine import has_mallopt, num_cores, peak_memory, processor_name, reset_peak_memory
from goodfit.core.places import cache_folder, free_bytes

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        has_mallopt=has_mallopt(),
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
    return processor_name()


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
    """Whether this CPU multiplies faster in bf16: by AMX, or by AVX-512 BF16 on other CPUs than Intel's.

    Without either oneDNN emulates bf16. Intel's AVX-512 BF16 without AMX is slower than its fp32 (resnet18 at 128 px on
    Sapphire Rapids: 40 against 61 img/s), AMD's is nearly twice as fast (Zen 5: 89 against 54).
    """
    amx, avx = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    if amx is not None and amx():
        return True
    return avx is not None and bool(avx()) and _cpu_vendor() != "GenuineIntel"


def _cpu_vendor() -> str:
    """What the kernel calls the maker of the CPU; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return ""


class HostCopy:
    """Scalars on their way to the host. Reading them waits for what made them, and not for what was queued after.

    `tensor.item()` on a GPU waits for the whole queue: read after the next step was queued, it would keep the host from
    preparing the step after that one.

    Args:
        values: Tensors of shape (), any dtype.
    """

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self._values = values
        self._copied: torch.Tensor | None = None
        if values[0].device.type == "cuda":
            stacked = torch.stack([value.to(torch.float32) for value in values])
            self._copied = torch.empty(len(values), pin_memory=True)
            self._copied.copy_(stacked, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> list[float]:
        """The values, waited for."""
        if self._copied is None:
            return [float(value) for value in self._values]
        self._done.synchronize()
        return [float(value) for value in self._copied.tolist()]


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
        """Move every tensor of a nested batch to the device.

        From ordinary memory a copy to a GPU waits for all that was queued before it, from pinned memory it does not.
        """
        if isinstance(data, torch.Tensor):
            if self.kind == "mps" and data.dtype == torch.float64:
                return data  # it has none; what is that exact is for the meters, which work on the host
            if self.kind == "cuda" and data.device.type == "cpu":
                data = data.pin_memory()  # torch reuses the pinned blocks
            return data.to(self.torch_device, non_blocking=True)
        if isinstance(data, dict):
            return {key: self.move(value) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return type(data)(self.move(value) for value in data)
        return data

    def autocast(self) -> AbstractContextManager[Any]:
        """Run the forward pass in the planned precision.

        tf32 is a switch of the process and not of a region: on CUDA it is set here, for this forward pass and for what
        follows until the next one, and so for its backward pass too. fp32 there means strict fp32.
        """
        if self.kind == "cuda":
            allow_tf32(self.precision == "tf32")
        lower = self.precision in ("bf16", "fp16")
        return torch.autocast(self.kind, dtype=_DTYPES[self.precision] if lower else torch.bfloat16, enabled=lower)

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
        return peak_memory()

    def reset_peak_memory(self) -> None:
        """Let `peak_memory` begin anew, with what is held now."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        reset_peak_memory()

    def hand_back(self) -> None:
        """Give memory that torch keeps for later back to the device."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, in torch's CPU allocator, or in NumPy's and Python's."""
    text = str(error).lower()
    told = "out of memory" in text or "can't allocate memory" in text
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


def allow_tf32(allowed: bool) -> None:
    """Let CUDA round the inputs of float32 matrix products and convolutions to 10 bits of mantissa, or not.

    By the older two settings: once the newer `fp32_precision` is set, torch 2.15 raises where these are read, and its
    own compiler reads them.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def tf32_kept() -> Iterator[None]:
    """Put the process's settings for tf32 back at the end; settings that cannot be read are left as they are."""
    try:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by the newer names
        yield
        return
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def compile_in_place(model: torch.nn.Module, mode: str) -> None:
    """Let torch compile a network's forward and backward passes at its first call; "off" does nothing.

    In place: the names of parameters, copies of the network, checkpoints and exports are as without it. Copies are not
    compiled. Every shape gets a kernel of its own, so that a resumed run computes what the first one did, whichever
    shapes it meets first; what is random (dropout) is drawn as it is without compiling.

    Raises:
        RequestError: there is no compiler for C++ here, which torch.compile needs.
    """
    if mode == "off":
        return
    problem = compiler_problem()
    if problem:
        raise RequestError(f"compile={mode}: {problem}.", next="install g++ or clang++, or use compile=off")
    from torch._inductor import list_mode_options

    options = {**list_mode_options(mode), "fallback_random": True}
    model.compile(options=options, dynamic=False)


def compiler_problem() -> str:
    """Why torch.compile cannot work here, as far as that can be told without trying; empty if it may."""
    import os

    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "clang++", "c++", "cl"]
    if any(shutil.which(name) for name in names):
        return ""
    return f"no C++ compiler was found ({', '.join(names)})"


@contextlib.contextmanager
def eagerly(model: torch.nn.Module) -> Iterator[None]:
    """Call a network without compiling, if it is a compiled one: evaluation has other shapes, and needs no compiling."""
    compiled = model._compiled_call_impl
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
