"""The size of each training batch: a function of its key, within its range, the same whatever makes the batch."""

from __future__ import annotations

import collections
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from goodfit.api import probe_child
from goodfit.api.probe import _write_batch
from goodfit.config.measured import AllocatorCost, BatchCost, Measured, StepCost
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve
from goodfit.config.sizes import InputSizes
from goodfit.core.errors import RequestError
from goodfit.data.augment import PRESETS, AugmentPreset, place
from goodfit.data.checks.audit import audit_dataset
from goodfit.data.formats.readers import read_dataset
from goodfit.data.loader import MicroBatch, TrainLoader, TrainSamples
from goodfit.data.split import split_dataset
from goodfit.data.store import RESERVE, PictureStore
from goodfit.engine.device import DevicePolicy
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import LossScale, Progress, TrainState
from goodfit.engine.step import StepContext
from goodfit.models.builder import ParameterGroup
from goodfit.models.catalog import look_up
from goodfit.outcome.utilisation import PARTS, utilisation
from goodfit.planning.measure import measure_batches
from goodfit.planning.pace import _steps
from goodfit.planning.trials import check_sizes
from goodfit.runtime.images import Preprocessing
from goodfit.tasks.classify import ClassifyTask
from plans import facts_of, plan_of

PREPROCESSING = Preprocessing(size=64, resize=73, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
BOTH = InputSizes(imgsz=64, multi_scale=0.5, progressive=0.5, epochs=6)


@pytest.mark.parametrize("multi_scale", [0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("imgsz", "step"), [(128, 32), (224, 32), (100, 32), (48, 32), (256, 64)])
def test_sizes_are_uniform_over_what_is_allowed_and_a_function_of_their_key(imgsz, step, multi_scale):
    sizes = InputSizes(imgsz=imgsz, step=step, multi_scale=multi_scale, epochs=3)
    low, high = (1 - multi_scale) * imgsz, (1 + multi_scale) * imgsz
    allowed = [s for s in range(imgsz % step, 1000, step) if low <= s <= high and s >= 32]
    assert list(sizes.allowed(0)) == allowed and imgsz in allowed
    drawn = [sizes.draw(seed=5, epoch=1, number=n) for n in range(2000)]
    counts = collections.Counter(drawn)
    assert sorted(counts) == allowed
    expected = len(drawn) / len(allowed)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 4 * len(allowed) + 12  # far beyond its mean, the number of sizes less one
    assert [sizes.draw(seed=5, epoch=1, number=n) for n in (1999, 3, 70)] == [drawn[n] for n in (1999, 3, 70)]
    if len(allowed) > 1:
        for other in ({"seed": 6, "epoch": 1}, {"seed": 5, "epoch": 2}):
            assert [sizes.draw(number=n, **other) for n in range(60)] != drawn[:60]
    assert {sizes.draw(seed=5, epoch=1, number=n, closing=True) for n in range(50)} == {imgsz}
    assert (sizes.smallest, sizes.largest, sizes.varies) == (allowed[0], allowed[-1], len(allowed) > 1)


def test_progressive_grows_evenly_and_is_full_when_two_thirds_are_done():
    sizes = InputSizes(imgsz=160, progressive=0.2, epochs=30)
    centres = [sizes.centre(e) for e in range(90)]  # also of a run that was extended
    assert centres == [32] * 5 + [64] * 5 + [96] * 5 + [128] * 5 + [160] * 70
    for imgsz, share, epochs in itertools.product((64, 128, 224), (0.1, 0.5, 0.7), (2, 3, 7, 300)):
        made = InputSizes(imgsz=imgsz, progressive=share, epochs=epochs)
        grown = [made.centre(e) for e in range(epochs)]
        assert grown == sorted(grown) and grown[0] >= max(32, share * imgsz) and grown[-1] == imgsz
        assert grown[0] - 32 < max(32, share * imgsz), "the first size is the smallest that was asked for"
        assert all(size == imgsz for e, size in enumerate(grown) if e >= 2 * epochs / 3)
        assert all((imgsz - size) % 32 == 0 for size in grown)


def test_both_together_stay_below_the_largest():
    for epoch in range(8):
        centre = BOTH.centre(epoch)
        assert all(max(32, 0.5 * centre) <= s <= min(1.5 * centre, 1.5 * 64) for s in BOTH.allowed(epoch))
    assert BOTH.allowed(0) == (32,) and BOTH.allowed(5) == (32, 64, 96) and BOTH.largest == 96 and BOTH.smallest == 32


def test_the_order_for_measuring_covers_the_run_from_its_first_batches():
    """Time is projected with the mean cost, so the mean over its batches must be that of the run; the largest comes first."""
    sizes = InputSizes(imgsz=128, multi_scale=0.5, progressive=0.5, epochs=30, closing_epochs=3)
    drawn = [sizes.draw(seed=0, epoch=e, number=n, closing=e >= 27) for e in range(30) for n in range(400)]
    even = replace(sizes, even=True)
    first = [even.draw(seed=0, epoch=0, number=n) for n in range(16)]
    assert first[0] == sizes.largest == 192 == max(drawn) and min(drawn) == sizes.smallest
    assert len(set(first)) == len(set(drawn)) == 6
    long = [even.draw(seed=0, epoch=0, number=n) for n in range(1, 200)]
    assert np.square(long).mean() == pytest.approx(np.square(drawn).mean(), rel=0.02)
    assert sizes.typical**2 / sizes.cost(sizes.typical) == pytest.approx(np.square(drawn).mean(), rel=0.02)
    epoch = [sizes.draw(seed=0, epoch=12, number=n) for n in range(4000)]
    assert sizes.epoch_cost(12) == pytest.approx(np.square(epoch).mean() / np.square(drawn).mean(), rel=0.03)
    assert sizes.epoch_cost(29) == pytest.approx(128**2 / np.square(drawn).mean(), rel=0.02)


@pytest.fixture
def index(make_images):
    reading = read_dataset(make_images(24))
    return split_dataset(audit_dataset(reading, max_bad=0.01).index, shares="70/15/15", split_seed=0, given=())


def loader(index, sizes=BOTH, *, workers=0, batch=6, rank=0, size=1, preset="standard"):
    rows = index.rows("train")
    store = PictureStore(index, rows, imgsz=96, cache="ram")
    store.warm(1)
    samples = TrainSamples(index=index, store=store, preset=PRESETS[preset], preprocessing=PREPROCESSING, flip=0.5, seed=3,
                           collate=ClassifyTask(index.class_names).collate, sizes=sizes)  # fmt: skip
    return TrainLoader(samples, rows, batch=batch, workers=workers, rank=rank, size=size)


def sides(groups):
    return [[m.data["image"].shape[-1] for m in group] for group in groups]


def test_loader_processes_change_nothing(index):
    alone = list(loader(index).groups(4, 0, 2))
    assert len({s for group in sides(alone) for s in group}) == 3, "an epoch with all three sizes, or this shows little"
    for workers in (1, 2):
        other = list(loader(index, workers=workers).groups(4, 0, 2))
        for mine, theirs in zip(itertools.chain(*alone), itertools.chain(*other), strict=True):
            assert np.array_equal(mine.samples, theirs.samples)
            assert torch.equal(mine.data["image"], theirs.data["image"])


def test_all_micro_batches_of_an_update_have_one_size_in_every_process(index):
    whole = sides(loader(index).groups(4, 0, 3))
    assert all(len(set(group)) == 1 for group in whole)
    for rank in range(2):
        mine = list(loader(index, rank=rank, size=2).groups(4, 0, 3))
        assert [group[0] for group in sides(mine)] == [group[0] for group in whole]
        assert all(len(set(group)) == 1 for group in sides(mine))
    assert sides([loader(index).group(4, 12, 2)])[0] == whole[2][:2]


@pytest.mark.parametrize("epoch", [1, 4])
def test_an_epoch_taken_up_again_goes_on_with_the_same_batches(index, epoch):
    whole = list(loader(index).groups(epoch, 0, 1))
    for done in range(len(whole)):
        left = list(loader(index).groups(epoch, done * 6, 1))
        assert len(left) == len(whole) - done
        for (mine,), (theirs,) in zip(left, whole[done:], strict=True):
            assert torch.equal(mine.data["image"], theirs.data["image"])


def test_the_closing_part_has_the_size_that_is_served(index):
    assert {s for group in sides(loader(index).groups(0, 0, 1, closing=True)) for s in group} == {64}
    assert {s for group in sides(loader(index).groups(0, 0, 1)) for s in group} == {32}
    assert {s for group in sides(loader(index, None).groups(4, 0, 1)) for s in group} == {64}
    assert sides([loader(index).evenly().group(0, 0, 1)]) == [[96]]


@pytest.mark.parametrize("preset", ["off", "light", "standard", "strong"])
def test_the_same_part_of_a_picture_is_seen_at_every_size(preset, index):
    """Boxes do not depend on the size; objects lie where they lay, but for the scale; and so do the pixels themselves."""
    keys = {"seed": 1, "epoch": 2, "samples": np.arange(40), "sizes": np.tile([160, 120], (40, 1)),
            "share": PREPROCESSING.size / PREPROCESSING.resize, "flip": 0.5}  # fmt: skip
    small, large = (place(PRESETS[preset], size=s, **keys) for s in (32, 96))
    assert np.array_equal(small.boxes, large.boxes) and np.array_equal(small.mirrored, large.mirrored)
    objects = np.array([[10.0, 20.0, 70.0, 90.0]])
    for k in range(40):
        assert np.allclose(3 * small.objects(k, objects), large.objects(k, objects))
    made = loader(index, preset="off" if preset == "strong" else preset)
    one, three = (made.group(0, 0, 1, size=s)[0].data["image"].float() for s in (32, 96))
    reduced = nn.functional.interpolate(three, size=32, mode="area")
    assert (reduced - one).abs().mean() < 0.5 * (reduced.roll(1, 0) - one).abs().mean()


def test_stored_pictures_are_large_enough_for_the_largest_input(real_data):
    """Nothing is enlarged from a reduced copy where the file has the pixels: at multi_scale=0.5 and at a strong zoom."""
    folder = real_data / "classify" / "trashnet" / "dataset-resized"
    for asked in ({"imgsz": 96, "multi_scale": 0.5}, {"imgsz": 64, "scale": 0.8}):
        plan = plan_of(**asked)
        sizes = InputSizes.of(plan)
        kept = sizes.kept_for(plan.scale.value)
        assert kept >= sizes.largest
        (file,) = sorted(folder.glob("glass/*.jpg"))[:1]
        reading = read_dataset(folder)
        row = reading.index.paths.index(str(file.relative_to(folder)))
        stored = PictureStore(reading.index, np.array([row]), imgsz=kept, cache="off").get(row)
        shorter = min(stored.shape[:2])
        assert shorter == min(384, round(RESERVE * kept)) >= sizes.largest
        zoomed = PRESETS["standard"].zoomed(plan.scale.value)
        assert zoomed.area is not None
        if plan.scale.value:  # the smallest crop, as far as it can be from the file; presets' own go down to this too
            assert zoomed.area[0] ** 0.5 * shorter >= min(zoomed.area[0] ** 0.5 * 384, 0.66 * sizes.largest)


def test_zoom_of_the_augmentation():
    standard, light = PRESETS["standard"].zoomed(0.2), PRESETS["light"].zoomed(0.4)
    keys = {"seed": 1, "epoch": 0, "samples": np.arange(4000), "sizes": np.full((4000, 2), 1000), "size": 64, "share": 1.0,
            "flip": 0.0}  # fmt: skip
    boxes = place(standard, **keys).boxes
    side = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) / 1000
    assert 0.795 < side.min() < 0.81 and side.max() > 0.97
    boxes = place(light, **keys).boxes
    side = (boxes[:, 2] - boxes[:, 0]) / 1000
    assert 0.598 < side.min() < 0.61 and 1.39 < side.max() < 1.402
    assert PRESETS["standard"].zoomed(0) == PRESETS["standard"] and PRESETS["light"].zoomed(0) == PRESETS["light"]
    assert standard.colour == PRESETS["standard"].colour and light.shift == PRESETS["light"].shift
    assert standard.closing() == AugmentPreset(area=(0.8**2 if 0.8**2 > 0.7 else 0.7, 1.0))


@pytest.mark.parametrize(
    ("asked", "words", "way"),
    [
        ({"imgsz": 32, "multi_scale": 0.5}, "sizes lie 32 pixels apart", "imgsz=64 or larger"),
        ({"imgsz": 128, "multi_scale": 0.2}, "has no other", "multi_scale=0.25"),
        ({"imgsz": 32, "progressive": 0.5}, "has no other", "imgsz=64 or larger"),
        ({"imgsz": 128, "progressive": 0.9}, "has no other", "progressive=0.75"),
        ({"imgsz": 128, "progressive": 0.5, "epochs": 1}, "needs epochs", "more epochs"),
        ({"imgsz": 128, "multi_scale": 0.5, "compile": "default"}, "kernel for every input size", "compile=off"),
        ({"imgsz": 128, "progressive": 0.5, "compile": "default"}, "sizes from 64 to 128 pixels", "compile=off"),
        ({"imgsz": 128, "scale": 0.5, "augment": "off"}, "augment=off has none", "augment=light"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_way_out(asked, words, way):
    with pytest.raises(RequestError, match=words) as caught:
        plan_of(**asked)
    assert way in caught.value.next
    if way.startswith(("multi", "prog")):  # the way out is one
        name, value = way.split("=")
        plan_of(**{**asked, name: float(value)})
    elif way.startswith("imgsz"):
        plan_of(**{**asked, "imgsz": int(way.split()[0].partition("=")[2])})


def test_a_network_of_one_input_size_is_refused():
    for name, step in (("vit_tiny_patch16_224", 0), ("mobilenetv2_100", 32), ("resnet18", 32)):
        assert look_up(name, "false", asked=True).size_step == step
    facts = replace(facts_of(), model=look_up("vit_tiny_patch16_224", "false", asked=True))
    for asked in ({"multi_scale": 0.5}, {"progressive": 0.5}):
        with pytest.raises(RequestError, match="built for one input size"):
            resolve(TrainRequest(**asked), facts)
    plan = resolve(TrainRequest(), facts)
    assert InputSizes.of(plan).allowed(0) == (plan.imgsz.value,) and not InputSizes.of(plan).varies


def test_the_plan_says_and_keeps_the_sizes():
    plan = plan_of(imgsz=128, multi_scale=0.5, progressive=0.5, epochs=30)
    assert "64, 96, 128, 160, 192 pixels" in plan.multi_scale.reason
    assert "from 64 pixels" in plan.progressive.reason and "after 20 of 30 epochs" in plan.progressive.reason
    assert InputSizes.of(Plan.from_dict(plan.to_dict())) == InputSizes.of(plan)
    again = resolve(TrainRequest(), facts_of(), plan)
    assert (again.multi_scale, again.progressive) == (plan.multi_scale, plan.progressive)
    assert plan.preprocessing == plan_of(imgsz=128, epochs=30).preprocessing, "what is served does not change"
    # Sizes end with the augmentation, also where that is off.
    assert plan_of(augment="off", imgsz=128, multi_scale=0.5).close_augment.value > 0
    assert plan_of(augment="off", imgsz=128).close_augment.value == 0
    assert "compiled anew" in plan.compile.reason
    # Room for the largest: the pictures of 192 pixels do not fit where those of 128 do.
    facts = facts_of()
    small = replace(facts, machine=replace(facts.machine, free_memory=4 * 1000 * 9 * 150**2))
    assert resolve(TrainRequest(imgsz=128), small).cache.value == "ram"
    assert resolve(TrainRequest(imgsz=128, multi_scale=0.5), small).cache.value == "off"


def test_compiling_is_never_chosen_by_measurement():
    """A cached table may hold a compiled way from a run of one size; no mode is tried where sizes vary."""
    from goodfit.config.execution import modes_to_try

    machine = facts_of().machine
    assert modes_to_try(plan_of(imgsz=128), machine, 1e6) and not modes_to_try(
        plan_of(imgsz=128, multi_scale=0.5), machine, 1e6
    )
    steps = tuple(
        StepCost(precision="fp32", channels_last=True, compile=c, seconds=s) for c, s in (("off", 1), ("default", 0.1))
    )
    measured = Measured(batch=64, steps=steps, memory=10**9, allocator=AllocatorCost())
    facts = replace(facts_of(), measured=measured)
    assert resolve(TrainRequest(imgsz=128), facts).compile.value == "default"
    assert resolve(TrainRequest(imgsz=128, multi_scale=0.5), facts).compile.value == "off"


class Task:
    """Cross entropy, for the network below."""

    def loss(self, model, batch):
        total = nn.functional.cross_entropy(model(batch["image"].float()), batch["target"], reduction="sum")
        return {"loss": (total, len(batch["target"]))}


class Limited:
    """A transform for which there is memory up to so many pixels a side, and which notes the sides that it saw."""

    def __init__(self, most=10**9):
        self.most = most
        self.seen = []

    def train(self, batch, **_):
        self.seen.append(batch["image"].shape[-1])
        if self.seen[-1] > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return batch


def step_of(network, transform):
    groups = [ParameterGroup("all", tuple(n for n, _ in network.named_parameters()), 0.1, 0.0)]
    device = DevicePolicy(kind="cpu", precision="fp32", channels_last=False)
    schedule = Schedule(kind="wsd", warmup_steps=0, stable_until=10**9, total_steps=10**9, lrf=0.0)
    state = TrainState(network, build_optimizer(network, groups, kind="sgd", momentum=0.0), None,
                       LossScale(torch.device("cpu"), active=False), Progress(schedule))  # fmt: skip
    return state, StepContext(Task(), transform, device, Ranks(), 0, 1.0)


def batch_of(num, side):
    data = {"image": torch.zeros(num, 3, side, side, dtype=torch.uint8), "target": torch.arange(num) % 3}
    return [MicroBatch(np.arange(num), data)]


def test_batch_sizes_are_measured_with_memory_for_the_largest_and_time_for_the_typical_input():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    transform = Limited()
    found = list(measure_batches(*step_of(network, transform), lambda num: [batch_of(num, 96), batch_of(num, 64)], [4],
                                 10**12, 10.0))  # fmt: skip
    assert isinstance(found[0], BatchCost) and not found[0].problem
    assert transform.seen[:2] == [96, 96] and set(transform.seen[2:]) == {64}
    found = list(measure_batches(*step_of(network, Limited(64)), lambda num: [batch_of(num, 96), batch_of(num, 64)], [4],
                                 10**12, 10.0))  # fmt: skip
    assert [cost.problem for cost in found] == ["out of memory"]


def test_the_rehearsal_tries_the_smallest_and_the_largest_input():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 7, stride=8), nn.Conv2d(4, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    good = check_sizes(*step_of(network, Limited()), [batch_of(4, 64), batch_of(4, 96)])
    assert good.passed and "64 and of 96" in good.evidence
    bad = check_sizes(*step_of(network, Limited()), [batch_of(4, 32), batch_of(4, 96)])
    assert not bad.passed and "32 pixels cannot be taken" in bad.evidence
    with pytest.raises(torch.OutOfMemoryError):
        check_sizes(*step_of(network, Limited(64)), [batch_of(4, 64), batch_of(4, 96)])


def test_the_pace_is_that_of_a_batch_of_mean_cost():
    """Six steps on small inputs say, by their pixels, what a run of larger ones takes."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    state, context = step_of(network, Limited())

    class Loader:
        def groups(self, *_, **__):
            while True:
                yield batch_of(4, 32)

    seconds = iter(np.arange(10000) / 8)  # every look at the clock is an eighth later
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("goodfit.planning.pace.time.perf_counter", lambda: next(seconds))
        plain = _steps(state, context, Loader(), 1.0, lambda _: 1.0)
        quarter = _steps(state, context, Loader(), 1.0, lambda group: (group[0].data["image"].shape[-1] / 64) ** 2)
    assert plain[:2] == (0.125, 0.125) and quarter[:2] == (0.5, 0.5)


def test_the_probe_takes_memory_from_the_largest_and_time_from_the_typical_input(index, tmp_path, monkeypatch):
    plan = plan_of(imgsz=64, multi_scale=0.5, progressive=0.5, epochs=30, accumulate=2)
    sizes = InputSizes.of(plan)
    _write_batch(tmp_path, plan, index, index.rows("train")[:6])
    ask = {
        "class_names": list(index.class_names),
        "counts": [2, 2, 2],
        "num_train": 50,
        "sizes": [16],
        "memory": 10**12,
    }
    taken = []

    def note(_state, _context, groups_of, *_):
        taken.append([[m.data["image"].shape for m in group] for group in groups_of(8)])
        return ()

    monkeypatch.setattr(probe_child, "measure_batches", note)
    monkeypatch.setattr(probe_child, "assemble_step", lambda *_: (None, None, None))
    list(probe_child._sizes(plan, tmp_path, ask))
    assert taken == [[[(4, 3, side, side)] * 2 for side in (96, sizes.typical)]] and sizes.typical < 96
    _, group_of = probe_child._batches(plan, tmp_path, ask)
    assert [m.data["image"].shape[-1] for m in group_of(8)] == [sizes.typical] * 2
    one = plan_of(imgsz=64, epochs=30)
    list(probe_child._sizes(one, tmp_path, ask))
    assert taken[1] == [[(8, 3, 64, 64)]]


def test_epochs_of_small_inputs_do_not_pass_for_speed():
    """A run whose inputs grow reaches all of the bare step's rate if each epoch goes as fast as its sizes let it."""
    plan = plan_of(imgsz=128, progressive=0.5, epochs=12)
    sizes = InputSizes.of(plan)
    assert sizes.epoch_cost(0) < 0.5 < 1 < sizes.epoch_cost(11)
    parts = dict.fromkeys((f"{part}_seconds" for part in PARTS), 0.0)
    epochs = [{**parts, "epoch": e, "seconds": 10.0, "train_seconds": 10.0, "step_seconds": 10.0,
               "samples_per_second": 100.0 / sizes.epoch_cost(e)} for e in range(12)]  # fmt: skip
    found = utilisation(epochs, 100.0, plan, num_cores=2)
    assert found.share_of_bare == pytest.approx(1.0) and found.bottleneck == "step"
    slower = [{**e, "samples_per_second": 0.5 * e["samples_per_second"]} for e in epochs]
    assert utilisation(slower, 100.0, plan, num_cores=2).share_of_bare == pytest.approx(0.5)
