"""From a plan and an index to everything that `fit` takes: what a run and its resumption have in common."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from goodfit.config.monitor import read_monitor
from goodfit.config.plan import EARLIER, Plan
from goodfit.config.sizes import InputSizes
from goodfit.config.time_rules import FORWARD, is_worth
from goodfit.core.errors import TrainingError
from goodfit.core.machine import keep_freed_memory
from goodfit.data.augment import PRESETS
from goodfit.data.batch_transform import ImageBatchTransform
from goodfit.data.index import DatasetIndex, data_hash
from goodfit.data.loader import EvalLoader, MicroBatch, TrainLoader, TrainSamples
from goodfit.data.split import subset
from goodfit.data.store import PictureStore
from goodfit.engine.device import DevicePolicy, compile_in_place, tf32_kept
from goodfit.engine.ema import Ema, ema_decay
from goodfit.engine.freezing import plan_freezing
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.policy import FitSettings
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import plan_schedule
from goodfit.engine.state import LossScale, Progress, TrainState
from goodfit.engine.step import StepContext
from goodfit.engine.swa import build_average
from goodfit.models.builder import build_network
from goodfit.models.groups import parameter_groups
from goodfit.models.weights import WeightReport
from goodfit.runtime.images import Preprocessing
from goodfit.tasks.classify import ClassifyTask

EVAL_BATCH = 64
KEEP_BYTES = 512_000_000  # of validation images kept as the serving path made them
NUM_FEW = 8
PROBE_SAMPLES = 10_000  # of training, and of validation, that the linear probe looks at, at most
TRAIN_SAMPLES = 1000  # training images that the finished model is measured on, at most
# Decisions that change no result, or only how long is trained, which a checkpoint's own schedule says and `extend` changes.
NOT_COMPUTED = ("epochs", "most_epochs", "time", "progressive", "workers", "cache", "prefetch", "allocator", "latency",
                "latency_threads")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FitParts:
    """What training takes, whatever is trained; the loaders are those of pictures, or of a user's samples."""

    plan: Plan
    context: StepContext
    train: Any
    val: Any
    state: TrainState
    settings: FitSettings

    @property
    def hashes(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        raise NotImplementedError

    @property
    def cache_bytes(self) -> int:
        """Bytes of decoded samples that are kept."""
        return 0

    @property
    def finish_seconds(self) -> float:
        """What bundle, report and the start of the program take, about."""
        return 12.0

    @property
    def num_served(self) -> int:
        """How many samples are looked at after training, by the test and what it is compared with."""
        return 0

    def paced(self) -> tuple[Any, Callable[[Any], float]]:
        """The training data to measure the run's pace with, and what a batch of it costs over the mean of the run."""
        return self.train, lambda _group: 1.0

    @property
    def cache_is_missing(self) -> bool:
        """Whether a cache on disk has still to be written."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageParts(FitParts):
    """The parts of a run on the images of an index, built from its plan and index alone."""

    index: DatasetIndex
    train: TrainLoader
    weights: WeightReport | None
    store: PictureStore

    @property
    def hashes(self) -> dict[str, Any]:
        """Of the plan and of the index."""
        return run_hashes(self.plan, data_hash(self.index))

    @property
    def cache_bytes(self) -> int:
        """Of the pictures that the plan keeps."""
        return self.store.num_bytes

    @property
    def cache_is_missing(self) -> bool:
        """Whether the plan keeps pictures on disk that are not there yet."""
        return self.plan.cache.value == "disk" and self.store.num_bytes > 0 and not self.store.path.is_file()

    def paced(self) -> tuple[TrainLoader, Callable[[Any], float]]:
        """All input sizes in turn, each weighed by its pixels."""
        sizes = InputSizes.of(self.plan)
        return self.train.evenly(), lambda group: sizes.cost(max(group[0].data["image"].shape[-2:]))

    def optimizer_for(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The plan's optimizer for a model of this kind."""
        return build_optimizer(model, parameter_groups(model, self.plan), kind=self.plan.optimizer.value,
                               momentum=self.plan.momentum.value)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts(ImageParts):
    """The parts of a run that learns one class per image."""

    task: ClassifyTask
    preprocessing: Preprocessing
    val: EvalLoader

    @property
    def num_served(self) -> int:
        """The test looks at its own, the gap to training at some, and the probe, where there is time for it, at many."""
        return (
            len(self.index.rows("test"))
            + min(TRAIN_SAMPLES, len(self.train.rows))
            + (self.num_probed if self.probes(0.0) else 0)
        )

    @property
    def num_probed(self) -> int:
        """How many samples the linear probe looks at."""
        return (
            min(PROBE_SAMPLES, len(self.train.rows))
            + min(PROBE_SAMPLES, len(self.index.rows("val")))
            + len(self.index.rows("test"))
        )

    def probes(self, image_seconds: float) -> bool:
        """Whether the time of the run, if it has one, has room for the linear probe.

        Args:
            image_seconds: What looking at a sample took, where that is known; a third of a step's share of it at least.
        """
        return is_worth(self.num_probed * max(image_seconds, self.plan.sample_seconds / FORWARD), self.plan.time.value)

    def eval_loader(self, rows: npt.NDArray[np.int64]) -> EvalLoader:
        """Any rows through the serving path, from their files."""
        return EvalLoader(self.index, rows, preprocessing=self.preprocessing, batch=EVAL_BATCH,
                          threads=self.plan.threads.value, collate=self.task.collate, keep=False)  # fmt: skip

    def few_samples(self) -> MicroBatch:
        """Eight training samples of as many classes as there are, through the serving path."""
        rows = self.train.rows
        targets = self.index.targets[rows]
        first = [rows[targets == c] for c in range(len(self.index.class_names))]
        chosen = [int(members[k]) for k in range(NUM_FEW) for members in first if k < len(members)][:NUM_FEW]
        (micro,) = self.eval_loader(np.array(chosen, np.int64))
        return micro


def assemble(plan: Plan, index: DatasetIndex, *, workers: int | None = None) -> Parts:
    """Build everything. The same plan and index give the same state, bit for bit, in any process.

    Args:
        workers: Loader processes instead of the plan's; they do not change what is computed.

    Raises:
        WeightsError: the pretrained weights cannot be had any more.
    """
    rows = subset(index, plan.fraction.value, plan.split_seed.value)
    ranks = Ranks()
    task = assemble_task(plan, index.class_names, np.bincount(index.targets[rows]))
    preprocessing = Preprocessing.from_dict(plan.preprocessing.value)
    store = picture_store(plan, index, rows, cache=plan.cache.value)
    loading = plan if workers is None else plan.changed(workers=workers)
    train = train_loader(loading, train_samples(plan, index, task, store), rows, ranks)
    val_rows = index.rows("val")
    val = EvalLoader(index, val_rows, preprocessing=preprocessing, batch=EVAL_BATCH, threads=plan.threads.value,
                     collate=task.collate, keep=len(val_rows) * 3 * preprocessing.size**2 <= KEEP_BYTES,
                     rank=ranks.rank, size=ranks.size)  # fmt: skip
    state, context, weights = assemble_step(plan, task, train.steps_per_epoch, ranks)
    return Parts(
        plan=plan,
        index=index,
        task=task,
        preprocessing=preprocessing,
        context=context,
        train=train,
        val=val,
        state=state,
        settings=fit_settings(plan),
        weights=weights,
        store=store,
    )  # fmt: skip


def picture_store(plan: Plan, index: DatasetIndex, rows: npt.NDArray[np.int64], *, cache: str) -> PictureStore:
    """The decoded pictures of these rows, large enough for the largest input of the plan."""
    return PictureStore(index, rows, imgsz=InputSizes.of(plan).kept_for(plan.scale.value), cache=cache)


def fit_settings(plan: Plan) -> FitSettings:
    """What may stop training or change it."""
    monitor, maximise = read_monitor(plan.monitor.value)
    return FitSettings(patience=plan.patience.value, min_delta=plan.min_delta.value, monitor=monitor, maximise=maximise,
                       most_epochs=plan.most_epochs.value, decay=plan.decay.value, close=plan.close_augment.value,
                       warmup=plan.warmup.value)  # fmt: skip


def train_samples(plan: Plan, index: DatasetIndex, task: ClassifyTask, store: PictureStore) -> TrainSamples:
    """What makes the plan's augmented samples."""
    return TrainSamples(
        index=index, store=store, sizes=InputSizes.of(plan),
        preset=replace(PRESETS[plan.augment.value].zoomed(plan.scale.value), policy=plan.policy.value),
        preprocessing=Preprocessing.from_dict(plan.preprocessing.value), flip=plan.flip.value, seed=plan.seed.value,
        collate=task.collate, shares_cores=plan.device.value == "cpu",
    )  # fmt: skip


def train_loader(plan: Plan, samples: TrainSamples, rows: npt.NDArray[np.int64], ranks: Ranks) -> TrainLoader:
    """The plan's loader of these rows."""
    return TrainLoader(samples, rows, batch=plan.batch.value, workers=plan.workers.value, threads=plan.threads.value,
                       prefetch=plan.prefetch.value, balance=plan.balance.value == "sample", rank=ranks.rank,
                       size=ranks.size)  # fmt: skip


def assemble_task(plan: Plan, class_names: Sequence[str], counts: npt.NDArray[np.int64]) -> ClassifyTask:
    """The task of a plan, for classes that have so many training samples."""
    return ClassifyTask(class_names, label_smoothing=plan.label_smoothing.value,
                        **balancing(plan.balance.value, counts))  # fmt: skip


def assemble_step(
    plan: Plan, task: ClassifyTask, steps_per_epoch: int, ranks: Ranks
) -> tuple[TrainState, StepContext, WeightReport | None]:
    """What one step of training needs, and what loading the weights did; no dataset is needed for it."""
    device = DevicePolicy(kind=plan.device.value, precision=plan.precision.value,
                          channels_last=plan.channels_last.value)  # fmt: skip
    transform = ImageBatchTransform(
        preprocessing=Preprocessing.from_dict(plan.preprocessing.value), num_classes=len(task.class_names),
        colour=PRESETS[plan.augment.value].colour, erase=plan.erase.value, mixup=plan.mixup.value,
        cutmix=plan.cutmix.value, seed=plan.seed.value, channels_last=plan.channels_last.value,
    )  # fmt: skip
    network, weights = build_network(plan, task.class_names)
    network = device.place(network)
    optimizer = build_optimizer(network, parameter_groups(network, plan), kind=plan.optimizer.value,
                                momentum=plan.momentum.value)  # fmt: skip
    state = initial_state(plan, network, optimizer, device, steps_per_epoch)
    compile_in_place(state.model, plan.compile.value)  # not its average, nor any copy
    freezing = plan_freezing(network, freeze=plan.freeze.value, unfreeze=plan.unfreeze.value,
                             steps_per_epoch=steps_per_epoch)  # fmt: skip
    context = StepContext(task, transform, device, ranks, plan.seed.value, plan.clip.value, plan.clip_value.value,
                          freezing)  # fmt: skip
    return state, context, weights


def assemble_probe(
    plan: Plan, index: DatasetIndex, rows: npt.NDArray[np.int64]
) -> tuple[torch.nn.Module, Iterator[torch.Tensor]]:
    """The network as it is before training, and these rows as its input through the serving path."""
    preprocessing = Preprocessing.from_dict(plan.preprocessing.value)
    device = DevicePolicy(kind=plan.device.value, precision="fp32", channels_last=plan.channels_last.value)
    network = device.place(build_network(plan, index.class_names)[0])
    transform = ImageBatchTransform(preprocessing=preprocessing, num_classes=0, colour=0.0, erase=0.0, mixup=0.0,
                                    cutmix=0.0, seed=0, channels_last=plan.channels_last.value)  # fmt: skip
    loader = EvalLoader(index, rows, preprocessing=preprocessing, batch=EVAL_BATCH, threads=plan.threads.value,
                        collate=ClassifyTask(index.class_names).collate, keep=False)  # fmt: skip
    return network, (transform.evaluate(device.move(micro.data))["image"] for micro in loader)


def balancing(balance: str, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """What a task takes against class imbalance, from the class counts of the training rows.

    "loss" weighs each class by the inverse of its count, so that all classes weigh the same and the mean weight of a
    sample is 1; "logit" gives the log of each class's share.
    """
    if balance == "loss":
        return {"class_weights": (counts.sum() / (len(counts) * np.maximum(1, counts))).tolist()}
    if balance == "logit":
        return {"log_prior": np.log(np.maximum(1, counts) / counts.sum()).tolist()}
    return {}


def initial_state(
    plan: Plan, network: torch.nn.Module, optimizer: torch.optim.Optimizer, device: DevicePolicy, steps_per_epoch: int
) -> TrainState:
    """The state of a run before its first step.

    Args:
        network: On its device.
        optimizer: For this network.
    """
    schedule = plan_schedule(plan.schedule.value, epochs=plan.epochs.value, warmup=plan.warmup.value,
                             lrf=plan.lrf.value, steps_per_epoch=steps_per_epoch, decay=plan.decay.value,
                             milestones=plan.milestones.value, period=plan.period.value, gamma=plan.gamma.value,
                             close=plan.close_augment.value)  # fmt: skip
    if plan.swa.value:
        schedule = schedule.averaging(round(plan.swa.value * plan.epochs.value) * steps_per_epoch)
    ema = Ema(network, ema_decay(schedule.total_steps, steps_per_epoch)) if plan.ema.value else None
    return TrainState(
        model=network,
        optimizer=optimizer,
        ema=ema,
        swa=build_average(network, ema) if plan.swa.value else None,
        loss_scale=LossScale(device.torch_device, active=device.scales_loss),
        progress=Progress(schedule, num_micro=plan.accumulate.value),
    )  # fmt: skip


def run_hashes(plan: Plan, data_sha256: str) -> dict[str, Any]:
    """What a checkpoint must agree with: the hash of the plan's values, and of the data. What a plan of an earlier version did not
    decide is left out, as it was in the hashes of that version."""
    decided = {name: d for name, d in plan.decisions().items() if d.reason != EARLIER}
    values = {name: d.value for name, d in decided.items() if name not in NOT_COMPUTED}
    text = json.dumps(values, sort_keys=True)
    return {"plan_sha256": hashlib.sha256(text.encode()).hexdigest(), "data_sha256": data_sha256}


@contextlib.contextmanager
def execution(plan: Plan) -> Iterator[None]:
    """Threads, determinism and random state as the plan says; everything is put back at the end,
    but for the variable that CUDA reads when it starts, and for the C library's habit of keeping freed memory."""
    if plan.allocator.value == "keep":
        keep_freed_memory()
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    with torch.random.fork_rng(), tf32_kept():
        try:
            torch.set_num_threads(plan.threads.value)
            if plan.deterministic.value:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
                torch.use_deterministic_algorithms(True)
                torch.backends.cudnn.benchmark = False
            else:
                torch.backends.cudnn.benchmark = plan.device.value == "cuda"
            yield
        except RuntimeError as error:
            if type(error).__module__.partition(".")[2].split(".")[0] in ("_dynamo", "_inductor"):
                raise TrainingError(f"torch could not compile the network: {str(error).splitlines()[0]}",
                                    kept="every checkpoint that was written", next="train with compile=off") from error  # fmt: skip
            raise
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)
            torch.backends.cudnn.benchmark = benchmark
