"""A user's own samples, losses and options: the same in any process, exact over micro-batches, refused with one clear error."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from goodfit.config.module import read_module_request
from goodfit.config.monitor import read_monitor
from goodfit.core.errors import DataError, RequestError
from goodfit.data.loader import MicroBatch
from goodfit.data.nested import collate_samples
from goodfit.data.samples import (
    ItemSamples,
    NoTransform,
    SampleLoader,
    SampleReader,
    TensorSamples,
    read_samples,
)
from goodfit.engine.device import DevicePolicy
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import LossScale, Progress, TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.models.groups import ParameterGroup
from goodfit.planning.tensors import tensors_of
from goodfit.tasks.module import ModuleTask
from goodfit.tasks.pair_loss import PairLoss
from goodfit.testing import ToyTask, make_dataset

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more processes than processors, here or there


class Noisy:
    """A dataset that draws from all three generators."""

    def __len__(self):
        return 23

    def __getitem__(self, row):
        noise = torch.rand(3) + torch.from_numpy(np.random.rand(3)).float() + random.random()
        return {"x": noise, "row": row}, float(row)


def read(data, name="train"):
    return read_samples(data, name, collate_samples)


def contents(groups):
    return [{k: v.clone() for k, v in tensors_of(micro.data).items()} for group in groups for micro in group]


def equal(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


def test_a_dataset_gives_the_same_samples_with_any_workers_from_any_position():
    def loader(workers, seed=0):
        return SampleLoader(read(Noisy()), batch=8, seed=seed, workers=workers)

    whole = contents(loader(0).groups(3, 0, 2))
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    assert equal(whole, contents(loader(2).groups(3, 0, 2)))
    assert equal(whole[2:], contents(loader(0).groups(3, 8, 2)))  # resumed after one batch, which is two micro-batches
    assert equal(whole[:2], contents([loader(0).group(3, 0, 2)]))
    assert not equal(whole, contents(loader(0).groups(4, 0, 2)))
    assert not equal(whole, contents(loader(0, seed=1).groups(3, 0, 2)))


def test_ranks_share_every_batch_and_evaluation_takes_each_sample_once():
    rows = [
        m.samples
        for r in range(2)
        for g in SampleLoader(read(Noisy()), batch=8, seed=0, rank=r, size=2).groups(0, 0, 1)
        for m in g
    ]
    alone = [m.samples for g in SampleLoader(read(Noisy()), batch=8, seed=0).groups(0, 0, 1) for m in g]
    assert sorted(np.concatenate(rows)) == sorted(np.concatenate(alone)) and len(np.unique(np.concatenate(alone))) == 16
    seen = [m.samples for r in range(2) for m in SampleReader(read(Noisy()), batch=5, seed=0, rank=r, size=2)]
    assert sorted(np.concatenate(seen)) == list(range(23))


def test_the_random_state_of_the_caller_is_left_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    list(SampleLoader(read(Noisy()), batch=8, seed=0).groups(0, 0, 1))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_nested_tensors_and_samples_make_the_same_batches():
    image, tokens, y = torch.randn(10, 3, 4, 4), torch.randint(0, 9, (10, 5)), np.arange(10)
    tensors = read(({"image": image, "tokens": tokens}, y))
    items = read([({"image": image[k], "tokens": tokens[k]}, y[k]) for k in range(10)])
    assert isinstance(tensors, TensorSamples) and isinstance(items, ItemSamples)
    one, other = (contents(SampleLoader(s, batch=4, seed=0).groups(0, 0, 1)) for s in (tensors, items))
    assert equal(one, other) and set(one[0]) == {"data/0/image", "data/0/tokens", "data/1", "rows"}
    assert isinstance(read(TensorDataset(image, tokens)), TensorSamples)


def test_numpy_doubles_become_what_the_module_has_and_python_floats_are_single():
    assert read((np.zeros((4, 2)), np.zeros(4))).data[0].dtype == torch.float32
    assert (
        read_samples((np.zeros((4, 2)),), "train", collate_samples, floats=torch.float64).data[0].dtype == torch.float64
    )
    assert (
        collate_samples([(1.5, 2), (2.5, 3)])[0].dtype == torch.float32 and collate_samples([1, 2]).dtype == torch.int64
    )


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(2), 1.0)] * 6)


def endless():
    while True:
        yield torch.zeros(1), 0


def test_a_short_iterable_is_read_and_an_endless_one_refused(monkeypatch):
    assert len(read(Stream())) == 6 and len(read((torch.ones(1), 0) for _ in range(4))) == 4
    monkeypatch.setattr("goodfit.data.samples.MOST_SAMPLES", 50)
    with pytest.raises(DataError, match="iterable of more than 50 samples"):
        read(endless())


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ((torch.zeros(4, 2), torch.zeros(5)), DataError, "`0` has 4, `1` has 5"),
        (DataLoader(TensorDataset(torch.zeros(4))), RequestError, "DataLoader"),
        ((torch.zeros(0, 2), torch.zeros(0)), DataError, "no samples"),
        (([["a"], ["b"]], torch.zeros(2)), RequestError, "no tensor"),
        (7, RequestError, "type int"),
        ("folder", RequestError, "type str"),
        ([], DataError, "no samples"),
    ],
)
def test_data_that_cannot_be_used(data, error, text):
    with pytest.raises(error, match=text):
        read(data)


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ([(torch.zeros(3), 0), (torch.zeros(4), 0)], r"shape at `0`: \(3,\) and \(4,\)"),
        ([{"a": 1}, {"b": 1}], "keys"),
        ([(1, 2), (1,)], "length"),
        ([(object(), 1)], "a object at `0`"),
    ],
)
def test_samples_that_make_no_batch(samples, text):
    with pytest.raises(DataError, match=text):
        collate_samples(samples)


def pairs():
    torch.manual_seed(0)
    logits, classes = torch.randn(12, 5), torch.randint(0, 5, (12,))
    classes_with_ignored = classes.clone()
    classes_with_ignored[[1, 4, 5]] = -100
    weight, many = torch.rand(5) + 0.1, torch.randn(12, 5, 3)
    dense = torch.randint(0, 5, (12, 3))
    shares = torch.rand(12, 5).softmax(1)
    yield "plain", nn.CrossEntropyLoss(), logits, classes
    yield "weight", nn.CrossEntropyLoss(weight=weight), logits, classes_with_ignored
    yield "smooth", nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2), logits, classes
    yield "dense", nn.CrossEntropyLoss(ignore_index=2), many, dense
    yield "shares", nn.CrossEntropyLoss(weight=weight), logits, shares
    yield (
        "nll",
        nn.NLLLoss(weight=weight, ignore_index=255),
        logits.log_softmax(1),
        classes.masked_fill(classes == 3, 255),
    )
    yield "mse", nn.functional.mse_loss, logits, shares
    yield "bce", nn.BCEWithLogitsLoss(weight=weight, pos_weight=weight), logits, (shares > 0.2).float()
    yield "huber", nn.HuberLoss(delta=0.1), logits, shares
    yield "margin", nn.MultiMarginLoss(weight=weight), logits, classes
    yield "labels", nn.MultiLabelSoftMarginLoss(), logits, (shares > 0.2).float()
    yield "poisson", nn.functional.poisson_nll_loss, logits, shares
    yield "function", lambda o, t: (o - t).square().mean(dim=1).sqrt().mean(), logits, shares


@pytest.mark.parametrize("case", list(pairs()), ids=lambda case: case[0])
def test_a_loss_in_parts_is_the_mean_that_it_gives_itself(case):
    _, loss, output, target = case
    pair = PairLoss(loss)
    assert pair.exact == (case[0] != "function")
    parts = [pair(output[a:b].double(), target[a:b], b - a) for a, b in ((0, 5), (5, 12))] if case[0] in ("plain", "dense") else [
        pair(output[a:b], target[a:b], b - a) for a, b in ((0, 5), (5, 12))]  # fmt: skip
    mean = sum(float(t) for t, _ in parts) / sum(float(c) for _, c in parts)
    assert mean == pytest.approx(float(loss(output, target)), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "output", "text"),
    [
        (nn.MSELoss(), torch.zeros(4, 1), "every output with every target"),
        (nn.MSELoss(reduction="none"), torch.zeros(4), "reduction='none'"),
        (nn.CrossEntropyLoss, torch.zeros(4), "the class CrossEntropyLoss"),
        (lambda o, t: (o - t) ** 2, torch.zeros(4), r"tensor of shape \(4,\)"),
        (lambda o, t: 3.0, torch.zeros(4), "returned float"),
        (nn.AdaptiveLogSoftmaxWithLoss(4, 5, [2]), torch.zeros(4), "parameters of its own"),
    ],
)
def test_losses_that_cannot_be_used(loss, output, text):
    with pytest.raises(RequestError, match=text):
        PairLoss(loss)(output, torch.zeros(4), 4)


def stepped(task, batches, num_steps=3):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    groups = [ParameterGroup("all", tuple(n for n, _ in model.named_parameters()), 0.05, 0.01)]
    schedule = Schedule(kind="wsd", warmup_steps=0, stable_until=10**6, total_steps=10**6, lrf=0.0)
    optimizer = build_optimizer(model, groups, kind="adamw", momentum=0.9)
    state = TrainState(model, optimizer, None, LossScale(torch.device("cpu"), active=False), Progress(schedule))
    device = DevicePolicy(kind="cpu", precision="fp32", channels_last=False)
    context = StepContext(task, NoTransform(), device, Ranks(), 0, 1.0)
    for _ in range(num_steps):
        train_step(state, context, batches, 1.0, copy_buffers(model))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def of(x, y, cuts):
    edges = [0, *cuts, len(x)]
    return [
        MicroBatch(np.arange(a, b), {"data": (x[a:b], y[a:b]), "rows": torch.arange(a, b)})
        for a, b in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("kind", ["weights and ignored", "function", "terms"])
def test_accumulation_is_exact_in_double(kind):
    torch.manual_seed(0)
    x, y = torch.randn(21, 6).double(), torch.randint(0, 5, (21,))
    y[:4] = -100
    if kind == "function":
        task = ModuleTask(loss=lambda o, t: (o[torch.arange(len(t)), t.clamp(min=0)] - 1).abs().mean())
    elif kind == "terms":

        def terms(module, batch):
            made = module(batch[0])
            return {"class": (nn.functional.cross_entropy(made, batch[1], reduction="sum"), (batch[1] >= 0).sum()),
                    "size": (made.square().sum(), made.numel())}  # fmt: skip

        task = ModuleTask(step_loss=terms)
    else:
        task = ModuleTask(loss=nn.CrossEntropyLoss(weight=torch.rand(5).double() + 0.1))
    whole = stepped(task, of(x, y, []))
    for cuts in ([5, 9], [2, 3, 4, 10, 18, 20]):
        assert float((stepped(task, of(x, y, cuts)) - whole).abs().max()) < 1e-12
    naive = ModuleTask(step_loss=lambda m, b: task.loss(m, {"data": b, "rows": b[1]}).popitem()[1][0] / 7)
    assert float((stepped(naive, of(x, y, [5, 9])) - whole).abs().max()) > 1e-6  # the control


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"augment": "strong"}, "augment: the dataset makes its own samples"),
        ({"imgsz": 64, "cutmix": 1.0}, "imgsz: .*\n.*cutmix: "),
        ({"model": "resnet18"}, "model: it is up to the module"),
        ({"img_size": 64}, "img_size: "),
        ({"freeze": "2"}, "requires_grad_"),
        ({"batch": 0.7}, "memory: "),
        ({"lr": "find"}, "lr_find: "),
        ({"epoch": 3}, "did you mean epochs"),
    ],
)
def test_options_that_make_no_sense_for_a_module_are_refused_by_name(asked, text):
    with pytest.raises(RequestError, match=text):
        read_module_request(asked)


def test_what_is_better_follows_from_the_name_or_the_sign():
    assert [read_monitor(t)[1] for t in ("loss", "val_mae", "top1_error", "accuracy", "f1", "+error", "-bleu")] == [
        False, False, False, True, True, True, False]  # fmt: skip
    assert read_monitor("-bleu")[0] == "bleu"


def test_the_meter_merges_to_the_same_and_keeps_terms_apart():
    task = ModuleTask(
        loss=nn.CrossEntropyLoss(), metrics={"accuracy": "accuracy", "top": lambda o, t: o.argmax(1) == t}
    )
    x, y = torch.randn(9, 5), torch.randint(0, 5, (9,))
    whole, meters = task.meter(), [task.meter(), task.meter()]
    whole.update(x, {"data": (x, y), "rows": y})
    for meter, part in zip(meters, (slice(0, 4), slice(4, 9)), strict=True):
        meter.update(x[part], {"data": (x[part], y[part]), "rows": y[part]})
    merged = task.meter()
    merged.merge([m.state() for m in meters])
    assert merged.compute() == pytest.approx(whole.compute()) and whole.compute()["top"] == whole.compute()["accuracy"]
    assert whole.compute()["loss"] == pytest.approx(float(nn.functional.cross_entropy(x, y)), rel=1e-6)


def test_the_toy_task_learns_and_the_toy_dataset_can_be_read(tmp_path):
    from goodfit.data.formats.readers import read_dataset
    from goodfit.data.reading import How

    task = ToyTask()
    x, y = task.samples(64)
    micro = MicroBatch(np.arange(64), task.collate(x, y))
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    before = copy.deepcopy(model)
    state = TrainState(model, build_optimizer(model, [ParameterGroup("all", ("weight", "bias"), 0.1, 0.0)], kind="adamw", momentum=0.9),
                       None, LossScale(torch.device("cpu"), active=False),
                       Progress(Schedule(kind="wsd", warmup_steps=0, stable_until=99, total_steps=99, lrf=0.0)))  # fmt: skip
    context = StepContext(
        task, NoTransform(), DevicePolicy(kind="cpu", precision="fp32", channels_last=False), Ranks(), 0, 1.0
    )
    for _ in range(60):
        train_step(state, context, [micro], 1.0, [])
    scores = []
    for network in (before, model):
        meter = task.meter()
        with torch.inference_mode():
            meter.update(task.predict(network, micro.data), micro.data)
        scores.append(meter.compute()["accuracy"])
    assert scores[1] > max(0.9, scores[0])
    made = read_dataset(make_dataset(tmp_path / "bars", per_class=4), How())
    assert list(made.index.class_names) == ["class0", "class1", "class2"] and len(made.index) == 12
    with pytest.raises(FileExistsError):
        make_dataset(tmp_path / "bars")
