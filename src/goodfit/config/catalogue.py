"""The catalogue: which networks there are for a task, what each costs, and the smallest sensible one to start with.

Pure values and rules, no torch. Each network is one record. A rung is a record that `model=auto` may choose; the rungs for one
kind of pictures, from the cheapest on, are a ladder, and the reason of every choice names the next rung. Figures:

- `num_parameters` and `multiply_adds` are counted on timm's own models by goodfit.models.cost; a test counts them again.
- `top1` is ImageNet validation accuracy as timm's results/results-imagenet.csv gives it, at `top1_imgsz` pixels, which may
  be more than the usual size.
- `serving_ms` is the network alone in ONNX Runtime on one Zen 5 thread, at 160 pixels for photos and at 32 for small pictures;
  it only tells a latency limit what is worth measuring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Pictures = Literal["tiny", "small", "photos"]
TINY_SIDE = (
    28  # pixels: digits of 8 px learn to 99 % with the cheapest network; from MNIST's 28 px on, the stem matters
)
SMALL_SIDE = 64  # pixels: up to this, pictures share little with the photos that weights were trained on
CPU_IMGSZ = 160
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause")  # licences of weights that the catalogue may name

# What a training step achieves: multiply-adds a second, three times the forward pass's counted for forward and backward.
CORE_RATE = 60e9  # of a processor core: resnet18 at 128 px, 63 img/s on two cores of a Xeon in fp32 (90 to 170 on Zen 5 in bf16)
GPU_RATE = (
    12e12  # resnet50d 1,078, convnext_small 487 img/s: timm's training benchmark on an RTX 3090 (amp, channels-last)
)
# Passes over the data that the time must allow. On 10,000 pictures of CIFAR-10 in 150 s of one core, resnet10t reached 65.9 % in
# 6.4 passes, resnet10t-stem2 59.4 in 2.8 and resnet10t-stem1 46.8 in one: a network that sees the data so rarely is too large.
PASSES = 10
DAY = 86_400.0  # seconds that a run may need where no time was asked for
MANY_PHOTOS = 5_000  # on a GPU: from here on, resnet50d ...
VERY_MANY_PHOTOS = 50_000  # ... and a network of the ConvNeXt family
MANY_CLASSES = 100  # as many photos: what tells a hundred classes apart is fine


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueModel:
    """A network of the catalogue.

    Attributes:
        name: As `model=` takes it, with the tag of its weights.
        imgsz: Its usual input, pixels.
        num_parameters: With ImageNet's 1,000 classes.
        multiply_adds: Of one image's forward pass at `imgsz`.
        top1: Percent; 0 where there are no weights.
        licence: Of its weights; "" where there are none and it starts from scratch.
        rung_for: The kinds of pictures for which model=auto may choose it.
        needs_weights: Whether it learns little without pretrained weights, so that it is no rung then.
        tried_for: The kinds of pictures for which a latency limit tries it.
        serving_ms: See above.
    """

    name: str
    imgsz: int
    num_parameters: int
    multiply_adds: int
    top1: float = 0.0
    top1_imgsz: int = 0
    licence: str = ""
    rung_for: tuple[Pictures, ...] = ()
    needs_weights: bool = False
    tried_for: tuple[Pictures, ...] = ()
    serving_ms: float = 0.0

    @property
    def repository(self) -> str:
        """Where its weights are on the model hub."""
        return f"timm/{self.name}"

    def cost_at(self, imgsz: int) -> float:
        """Multiply-adds at another image size, which follow the number of pixels."""
        return self.multiply_adds * (imgsz / self.imgsz) ** 2


_SCRATCH: dict[str, Any] = {"imgsz": 32, "rung_for": ("tiny", "small")}
_APACHE: dict[str, Any] = {"licence": "apache-2.0", "top1_imgsz": 224}
_PHOTOS: dict[str, Any] = {"rung_for": ("photos",)}
CLASSIFY: tuple[CatalogueModel, ...] = (
    CatalogueModel(name="resnet10t", num_parameters=5_435_488, multiply_adds=22_894_592, **_SCRATCH),
    CatalogueModel(name="mobilenetv3_small_050.lamb_in1k", num_parameters=1_593_224, multiply_adds=24_188_688, imgsz=224,
                   top1=57.910, **_APACHE, tried_for=("small", "tiny"), serving_ms=1.0),
    CatalogueModel(name="mobilenetv3_small_100.lamb_in1k", num_parameters=2_542_856, multiply_adds=56_510_400, imgsz=224,
                   top1=67.656, **_APACHE, tried_for=("photos", "small", "tiny"), serving_ms=1.7),
    CatalogueModel(name="resnet10t-stem2", num_parameters=5_435_488, multiply_adds=70_080_512, **_SCRATCH,
                   tried_for=("small",), serving_ms=1.5),  # not measured: guessed from its multiply-adds
    CatalogueModel(name="mobilenetv3_large_100.ra_in1k", num_parameters=5_483_032, multiply_adds=216_589_760, imgsz=224,
                   top1=75.766, **_APACHE, tried_for=("photos",), serving_ms=4.0),
    CatalogueModel(name="resnet10t-stem1", num_parameters=5_435_488, multiply_adds=278_786_048, **_SCRATCH),
    CatalogueModel(name="mobilenetv2_100.ra_in1k", num_parameters=3_504_872, multiply_adds=300_774_272, imgsz=224,
                   top1=72.976, **_APACHE, tried_for=("photos",), serving_ms=4.5),
    CatalogueModel(name="efficientnet_b0.ra_in1k", num_parameters=5_288_548, multiply_adds=385_814_752, imgsz=224,
                   top1=77.694, **_APACHE, tried_for=("photos",), serving_ms=8.0),
    CatalogueModel(name="resnet18-stem1", num_parameters=11_689_512, multiply_adds=563_793_920, **_SCRATCH),
    CatalogueModel(name="resnet10t.c3_in1k", num_parameters=5_435_488, multiply_adds=698_688_000, imgsz=176, **_PHOTOS,
                   top1=68.358, **_APACHE, tried_for=("small", "tiny"), serving_ms=12.4),
    CatalogueModel(name="resnet18.a1_in1k", num_parameters=11_689_512, multiply_adds=1_814_073_344, imgsz=224, **_PHOTOS,
                   top1=73.158, licence="apache-2.0", top1_imgsz=288, tried_for=("photos",), serving_ms=20.6),
    CatalogueModel(name="resnet50d.a1_in1k", num_parameters=25_576_264, multiply_adds=4_328_824_832, imgsz=224, **_PHOTOS,
                   top1=81.450, licence="apache-2.0", top1_imgsz=288),
    CatalogueModel(name="convnext_tiny.in12k_ft_in1k", num_parameters=28_589_128, multiply_adds=4_455_531_264, imgsz=224,
                   top1=84.450, licence="apache-2.0", top1_imgsz=288, **_PHOTOS, needs_weights=True),
    CatalogueModel(name="convnext_small.in12k_ft_in1k", num_parameters=50_223_688, multiply_adds=8_683_712_256, imgsz=224,
                   top1=85.330, licence="apache-2.0", top1_imgsz=288, **_PHOTOS, needs_weights=True),
)  # fmt: skip
CATALOGUE: dict[str, tuple[CatalogueModel, ...]] = {"classify": CLASSIFY}
# In 150 s on one core, 10,000 pictures of CIFAR-10, it is ahead (65.9 % after 6.4 passes; -stem2 59.4 % after 2.8). That it ends
# lower in a long run, its last maps being one pixel, is expected and was not measured: benchmarks/small_pictures.py would.
START_SMALL = "resnet10t"
START_PHOTOS = "resnet18"


def pictures_of(side: int) -> Pictures:
    """What pictures of so many pixels (the longer side) count as."""
    return "tiny" if side < TINY_SIDE else "small" if side <= SMALL_SIDE else "photos"


def usual_imgsz(side: int, device: str, native: int) -> tuple[int, str]:
    """Image size for pictures of so many pixels where none is asked for, and why; `native` is the network's own."""
    if side <= SMALL_SIDE:
        return max(32, math.ceil(side / 32) * 32), f"pictures of {side} px, up to a multiple of 32"
    if device == "cpu":
        return min(CPU_IMGSZ, native), "a CPU: half the cost of 224 for a point or two"
    return native, ""


def ladder(task: str, pictures: Pictures) -> list[CatalogueModel]:
    """The rungs for such pictures, cheapest first."""
    return [model for model in CATALOGUE[task] if pictures in model.rung_for]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What the choice of a network looks at.

    Attributes:
        num_train, num_classes: Of the training split.
        side: Median longer side of the pictures, pixels.
        imgsz: What was asked for; 0 if it is to be decided.
        epochs: What was asked for; 0 if they are to be decided.
        seconds: For the whole run; 0 is no limit.
        device: "cpu", "cuda", "mps".
        weights: Whether pretrained weights will be used.
    """

    num_train: int
    num_classes: int
    side: int
    imgsz: int = 0
    epochs: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    num_cores: int = 1
    weights: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """A rung, why, and what comes next if it underfits (None on the last)."""

    model: CatalogueModel
    reason: str
    following: CatalogueModel | None


def choose_model(need: Need, task: str = "classify") -> Choice:
    """The smallest sensible network: by pictures, data and machine, and smaller where the time is too short for it.

    Pictures of 32 pixels that are asked to be enlarged over 64 need no other stem, and count as photos.
    """
    pictures = pictures_of(max(need.side, min(need.imgsz, SMALL_SIDE + 1)))
    rungs = [rung for rung in ladder(task, pictures) if need.weights or not rung.needs_weights]
    number, reason = _start(rungs, pictures, need)
    passed_over = ""
    while number > 0 and (passes := _passes(rungs[number], need)) < _enough(need):
        passed_over = passed_over or f"; {rungs[number].name} would see them only {passes:.1f} times in {_span(need)}"
        number -= 1
    following = rungs[number + 1] if number + 1 < len(rungs) else None
    return Choice(rungs[number], f"{reason}{passed_over}; {_next(rungs[number], following, need)}", following)


def _start(rungs: list[CatalogueModel], pictures: Pictures, need: Need) -> tuple[int, str]:
    """The rung that suits the data where time does not matter, and why."""
    if pictures == "tiny":
        return 0, f"pictures of {need.side} px need no larger network"
    if pictures == "small":
        return _number(rungs, START_SMALL), f"pictures of {need.side} px: the cheapest network to start with"
    many = f"{need.num_train:,} photos of {need.num_classes} classes"
    if need.device != "cuda":
        return _number(
            rungs, START_PHOTOS
        ), f"{many} on {'a CPU' if need.device == 'cpu' else 'an Apple GPU'}: a small residual network to start with"
    if need.num_train >= VERY_MANY_PHOTOS:
        return _number(
            rungs, "convnext_tiny" if need.weights else "resnet50d"
        ), f"{many} on a GPU can use a large network"
    if need.num_train >= MANY_PHOTOS or need.num_classes >= MANY_CLASSES:
        return _number(rungs, "resnet50d"), f"{many} on a GPU: a residual network of middle size"
    return _number(rungs, START_PHOTOS), f"{many}: a small residual network to start with"


def _number(rungs: list[CatalogueModel], architecture: str) -> int:
    return [rung.name.split(".")[0] for rung in rungs].index(architecture)


def _enough(need: Need) -> int:
    """Passes over the data that a run should have."""
    return min(PASSES, need.epochs) if need.epochs else PASSES


def _passes(rung: CatalogueModel, need: Need) -> float:
    """Passes over the data that the time allows, roughly."""
    imgsz = need.imgsz or usual_imgsz(need.side, need.device, rung.imgsz)[0]
    rate = GPU_RATE if need.device == "cuda" else CORE_RATE * need.num_cores
    return (need.seconds or DAY) * rate / (3 * rung.cost_at(imgsz) * max(1, need.num_train))


def _span(need: Need) -> str:
    return f"{need.seconds:,.0f} s" if need.seconds else "a day"


def _next(rung: CatalogueModel, following: CatalogueModel | None, need: Need) -> str:
    if following is None:
        return "the largest that model=auto tries"
    imgsz = need.imgsz or usual_imgsz(need.side, need.device, rung.imgsz)[0]
    ratio = following.cost_at(imgsz) / rung.cost_at(imgsz)
    return f"next if it underfits: {following.name} ({ratio:.1f} × the cost)"
