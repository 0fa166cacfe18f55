"""What was found out before the plan: about the data, the machine and the model. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from goodfit.config.latency import Fitted
from goodfit.config.measured import Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """The accepted part of a dataset, after audit and split. Sizes are pixels, shares are fractions."""

    format: str
    format_reason: str
    num_train: int
    num_val: int
    num_test: int
    num_classes: int
    smallest_class: int
    largest_class: int
    median_side: int  # median over images of the longer side
    grey_share: float
    given_splits: tuple[str, ...]
    pixel_bytes_at: float  # bytes of one decoded training image per squared pixel of imgsz
    decode_seconds: float  # to decode one image, on one thread, measured during the audit
    task: str = "classify"
    shape: tuple[float, float] = (1.0, 1.0)  # width and height over the longer side, of nearly all pictures
    most_objects: int = 0  # of a training picture, crowds left aside
    object_side: float = 0.0  # of the smaller objects, as a share of the picture's longer side; 0 where there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """The machine that will run the plan. Memory is bytes."""

    device: str
    device_reason: str
    device_name: str
    native_bf16: bool
    num_cores: int
    free_memory: int
    free_disk: int = 0  # where caches are kept
    has_mallopt: bool = False  # glibc, whose habit of handing memory back can be changed while a process runs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model of the catalogue and whether its pretrained weights can be had."""

    name: str
    num_parameters: int
    native_imgsz: int
    stride: int  # the input side must be a multiple of it; 1 if any side works
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_share: float
    weights: str  # hub name or file path; empty if there are none
    weights_kind: str  # "hub", "file" or "none"
    weights_problem: str  # why the weights cannot be had; empty if they can
    licence: str
    has_drop_path: bool
    has_attention: bool = False
    size_step: int = 32  # between two sides that training may vary over, pixels; 0 if it takes one size only
    labels: tuple[str, ...] = ()  # classes that the weights' head knows
    known_classes: int = 0  # of the data, among them
    square: bool = False  # it takes square inputs only
    most_places: int = 0  # of the input that a detector chooses; it must have as many
    strides: tuple[int, ...] = ()  # pixels between those places, by level
    bundle_imgsz: int = 0  # that the weights were trained at, where they are a bundle's; pixels


@dataclass(frozen=True, slots=True)
class FirstStep:
    """What one step of training took, before anything else was measured.

    Attributes:
        imgsz: Longer side of its input, pixels.
        seconds: Of one of its pictures.
    """

    imgsz: int
    seconds: float

    def at(self, imgsz: int) -> float:
        """Seconds of a picture at another size: convolutions cost by its pixels."""
        return self.seconds * (imgsz / self.imgsz) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that `resolve` may look at."""

    data: DataFacts
    machine: MachineFacts
    model: ModelFacts
    measured: Measured | None = None  # None: rules decide
    fitted: Fitted | None = None  # what fits the latency limit, where one was asked for
    first_step: FirstStep | None = None  # of a run that has a time to keep

    def sample_seconds(self, imgsz: int) -> float:
        """What a training sample takes of a step at this size; 0 where none was timed."""
        return 0.0 if self.first_step is None else self.first_step.at(imgsz)
