"""From the plan of a detector and its index to everything that `fit` takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from goodfit.api.assemble import EVAL_BATCH, KEEP_BYTES, NUM_FEW, ImageParts, fit_settings, initial_state
from goodfit.config.detect import usual_most
from goodfit.config.plan import Plan
from goodfit.config.sizes import InputSizes
from goodfit.data.batch_transform import ImageBatchTransform
from goodfit.data.index import DatasetIndex
from goodfit.data.loader import MicroBatch, TrainLoader
from goodfit.data.objects import MaskBook, object_counts, repeat_factors
from goodfit.data.scene_loader import SceneReader, SceneSamples
from goodfit.data.scenes import SCENE_PRESETS
from goodfit.data.split import subset
from goodfit.data.store import PictureStore
from goodfit.engine.device import DevicePolicy, compile_in_place
from goodfit.engine.freezing import plan_freezing
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.ranks import Ranks
from goodfit.engine.step import StepContext
from goodfit.models.detection.build import build_detector, family_of
from goodfit.models.groups import parameter_groups
from goodfit.runtime.letterbox import Letterbox
from goodfit.tasks.detect import DetectTask

CANDIDATES = 3  # that are looked at for each object that may be reported, at least
JUDGED = 100  # training pictures that the finished model is measured on, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectParts(ImageParts):
    """The parts of a detector's run."""

    task: DetectTask
    preprocessing: Letterbox
    val: SceneReader

    @property
    def finish_seconds(self) -> float:
        """Export and its proof on 69 pictures take some 16 s longer than those of a classifier."""
        return 28.0

    @property
    def num_served(self) -> int:
        """The test looks at its own pictures, the threshold at those of validation and at some of training."""
        return len(self.index.rows("test")) + len(self.index.rows("val")) + min(JUDGED, len(self.train.rows))

    def eval_loader(self, rows: npt.NDArray[np.int64]) -> SceneReader:
        """Any rows through the serving path, from their files."""
        return _reader(self.plan, self.index, rows, self.task, keep=False)

    def few_samples(self) -> MicroBatch:
        """Eight training samples, those with objects first, through the serving path; fewer where memory ran out for a micro-batch."""
        rows = self.train.rows
        counts = object_counts(self.index, rows)
        num = max(2, NUM_FEW * self.plan.accumulate.value // self.state.progress.num_micro)
        chosen = rows[np.argsort(counts == 0, kind="stable")][:num]
        (micro,) = self.eval_loader(chosen)
        return micro


def _reader(
    plan: Plan,
    index: DatasetIndex,
    rows: npt.NDArray[np.int64],
    task: DetectTask,
    *,
    keep: bool,
    ranks: Ranks | None = None,
    masks: MaskBook | None = None,
) -> SceneReader:
    ranks = ranks or Ranks()
    masks = masks or (MaskBook(index) if task.family.has_masks else None)
    return SceneReader(index, rows, letterbox=Letterbox.from_dict(plan.preprocessing.value), batch=max(NUM_FEW, min(EVAL_BATCH, 2 * plan.batch.value)),
                       threads=plan.threads.value, collate=task.collate, keep=keep, rank=ranks.rank, size=ranks.size, masks=masks)  # fmt: skip


def assemble_detector(plan: Plan, index: DatasetIndex, *, workers: int | None = None) -> DetectParts:
    """Build everything. The same plan and index give the same state, bit for bit, in any process.

    Args:
        workers: Loader processes instead of the plan's; they do not change what is computed.

    Raises:
        WeightsError: the pretrained weights cannot be had any more.
    """
    rows = subset(index, plan.fraction.value, plan.split_seed.value)
    ranks, letterbox = Ranks(), Letterbox.from_dict(plan.preprocessing.value)
    family = family_of(plan)
    most = plan.max_det.value or usual_most(int(object_counts(index, rows).max(initial=0)))
    selection = replace(family.selection, most=most, candidates=max(family.selection.candidates, CANDIDATES * most))
    task = DetectTask(index.class_names, family, selection=selection)
    masks = MaskBook(index) if task.family.has_masks else None
    sizes = InputSizes.of(plan)
    short = round(sizes.kept_for(plan.scale.value) * min(letterbox.shape) / max(letterbox.shape))
    store = PictureStore(index, rows, imgsz=short, cache=plan.cache.value)
    preset = SCENE_PRESETS[plan.augment.value]
    zoom = plan.scale.value if plan.scale.value or plan.scale.source == "asked" else preset.zoom
    preset = replace(preset, zoom=zoom, mosaic=plan.mosaic.value, copy_paste=plan.copy_paste.value)
    samples = SceneSamples(index=index, store=store, rows=rows, preset=preset, letterbox=letterbox, flip=plan.flip.value,
                           seed=plan.seed.value, collate=task.collate, sizes=sizes, masks=masks)  # fmt: skip
    repeats = repeat_factors(index, rows) if plan.balance.value == "sample" else None
    train = TrainLoader(samples, rows, batch=plan.batch.value, workers=plan.workers.value if workers is None else workers,
                        threads=1 if plan.device.value == "cpu" else plan.threads.value, prefetch=plan.prefetch.value, repeats=repeats, rank=ranks.rank,
                        size=ranks.size)  # fmt: skip
    val_rows = index.rows("val")
    kept = len(val_rows) * 3 * letterbox.width * letterbox.height <= KEEP_BYTES
    val = _reader(plan, index, val_rows, task, keep=kept, ranks=ranks, masks=masks)
    device = DevicePolicy(
        kind=plan.device.value, precision=plan.precision.value, channels_last=plan.channels_last.value
    )
    transform = ImageBatchTransform(preprocessing=letterbox, num_classes=len(index.class_names), colour=preset.colour, erase=0.0,
                                    mixup=0.0, cutmix=0.0, seed=plan.seed.value, channels_last=plan.channels_last.value)  # fmt: skip
    network, weights = build_detector(plan, index.class_names)
    network = device.place(network)
    optimizer = build_optimizer(
        network, parameter_groups(network, plan), kind=plan.optimizer.value, momentum=plan.momentum.value
    )
    state = initial_state(plan, network, optimizer, device, train.steps_per_epoch)
    compile_in_place(state.model, plan.compile.value)
    freezing = plan_freezing(
        network, freeze=plan.freeze.value, unfreeze=plan.unfreeze.value, steps_per_epoch=train.steps_per_epoch
    )
    context = StepContext(
        task, transform, device, ranks, plan.seed.value, plan.clip.value, plan.clip_value.value, freezing
    )
    return DetectParts(plan=plan, index=index, task=task, preprocessing=letterbox, context=context, train=train, val=val,
                       state=state, settings=fit_settings(plan), weights=weights, store=store)  # fmt: skip
