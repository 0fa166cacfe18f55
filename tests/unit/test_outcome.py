"""Metrics, intervals, baselines and the ledger of looks, against independent computations."""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from goodfit.metrics.classification import ClassificationMeter, per_class, wilson_interval
from goodfit.outcome.baselines import constant_objects, linear_probe, majority_class
from goodfit.outcome.ledger import count_look, read_looks
from goodfit.outcome.report import write_report
from goodfit.runtime.predictor import softmax


def outputs(num=200, classes=5, seed=0):
    random = np.random.default_rng(seed)
    logits = torch.tensor(random.normal(size=(num, classes)), dtype=torch.float32)
    return logits, torch.tensor(random.integers(0, classes, num))


def test_metrics_equal_scikit_learn():
    from sklearn import metrics

    logits, targets = outputs()
    meter = ClassificationMeter(5)
    for part in (slice(0, 33), slice(33, 34), slice(34, 200)):
        meter.update(logits[part], {"target": targets[part]})
    predicted, true = logits.argmax(1).numpy(), targets.numpy()
    found = meter.compute()
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"), abs=1e-12)
    assert found["loss"] == pytest.approx(metrics.log_loss(true, softmax(logits.numpy())), rel=1e-6)
    assert np.array_equal(meter.confusion(), metrics.confusion_matrix(true, predicted))
    precision, recall, f1, count = metrics.precision_recall_fscore_support(true, predicted)
    for c, row in enumerate(per_class(meter.confusion())):
        assert (row["precision"], row["recall"], row["f1"], row["count"]) == pytest.approx(
            (precision[c], recall[c], f1[c], count[c]))  # fmt: skip


def test_constant_objects_are_those_that_lie_upon_most():
    """Sixty objects near one place, thirty near another of another class, one alone: found in that order, each once."""
    random = np.random.default_rng(0)

    def near(box, num):
        return np.array(box) + random.uniform(-0.01, 0.01, (num, 4))

    places = [([0.1, 0.1, 0.4, 0.4], 60, 0), ([0.5, 0.5, 0.9, 0.9], 30, 1), ([0.0, 0.8, 0.1, 0.9], 1, 0)]
    boxes = np.concatenate([near(box, num) for box, num, _ in places])
    classes = np.concatenate([np.full(num, kind) for _, num, kind in places])
    order = random.permutation(len(boxes))
    found, scores, kinds = constant_objects(boxes[order], classes[order])
    assert kinds.tolist() == [0, 1, 0] and scores == pytest.approx(np.array([60, 30, 1]) / 91)
    assert np.abs(found - [box for box, _, _ in places]).max() < 0.011
    none = constant_objects(np.zeros((0, 4)), np.zeros(0, np.int64))
    assert none[0].shape == (0, 4) and none[1].shape == none[2].shape == (0,)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_merged_meters_equal_one(num_parts):
    logits, targets = outputs(41)
    whole = ClassificationMeter(5)
    whole.update(logits, {"target": targets})
    parts = []
    for rank in range(num_parts):
        meter = ClassificationMeter(5)
        meter.update(logits[rank::num_parts], {"target": targets[rank::num_parts]})
        parts.append(meter.state())
    merged = ClassificationMeter(5)
    merged.merge(parts)
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert np.array_equal(merged.confusion(), whole.confusion())


def test_a_meter_without_samples_is_not_a_number():
    assert all(math.isnan(v) for v in ClassificationMeter(3).compute().values())


def test_wilson_interval_against_published_values_and_coverage():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    random = np.random.default_rng(0)
    hits = random.binomial(165, 0.9, 4000)
    covered = np.mean([low <= 0.9 <= high for low, high in (wilson_interval(int(h), 165) for h in hits)])
    assert 0.93 < covered < 0.97
    with pytest.raises(ValueError, match="sample"):
        wilson_interval(0, 0)


def test_the_probe_equals_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(3)
    centres = random.normal(size=(3, 12))
    y = random.integers(0, 3, 300)
    x = torch.tensor(centres[y] + 1.5 * random.normal(size=(300, 12)))
    found = linear_probe((x[:150], y[:150]), (x[150:220], y[150:220]), x[220:], 3)
    mean, std = x[:150].mean(0), x[:150].std(0)
    scaled = ((x - mean) / std).numpy()
    theirs = LogisticRegression(C=1 / (found.strength * 150), max_iter=5000, tol=1e-10).fit(scaled[:150], y[:150])
    assert found.gradient < 1e-4, "converged"
    assert (found.predictions == theirs.predict(scaled[220:])).mean() > 0.98
    assert found.val_accuracy == pytest.approx(theirs.score(scaled[150:220], y[150:220]), abs=0.02)


def test_majority():
    assert majority_class(np.array([2, 2, 0, 1, 2])) == 2


def test_every_look_is_counted_per_test_set(tmp_path, monkeypatch):
    run = tmp_path / "r"
    run.mkdir()
    assert [count_look(run, "a", weights_sha256="w") for _ in range(2)] == [1, 2]
    assert count_look(run, "b", weights_sha256="w") == 1
    with open(tmp_path / "test_looks.jsonl", "a") as handle:
        handle.write('{"torn')
    monkeypatch.chdir(run)
    assert count_look(Path("."), "a", weights_sha256="w") == 3
    looks = read_looks(tmp_path / "test_looks.jsonl")
    assert len(looks) == 4 and {row["run"] for row in looks} == {"r"}
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        numbers = list(pool.map(_look, [str(run)] * 12))
    assert sorted(numbers) == list(range(4, 16))  # runs that end at one moment count one after the other


def _look(run):
    return count_look(Path(run), "a", weights_sha256="w")


def test_names_are_shown_as_text_in_the_report(tmp_path):
    evil = "<script>alert(1)</script>"
    test = {"accuracy": 0.9, "low": 0.8, "high": 0.95, "n": 10, "macro_f1": 0.9, "look": 1, "interval": "95 %",
            "per_class": [{"class": evil, "precision": 1, "recall": 1, "f1": 1, "count": 5}]}  # fmt: skip
    facts = {
        "name": evil, "data": {"note": evil, "num_items": 1, "classes": [evil], "splits": {"train": 1, "val": 1, "test": 1}},
        "gap": {}, "findings": [{"kind": "leak", "severity": "warning", "count": 4, "items": [evil] * 4, "action": evil, "override": evil}],
        "decisions": {"lr": {"value": evil, "source": "rule", "reason": evil}}, "test": test, "comparison": [],
        "bundle": None, "gain": None, "training": evil, "rate": {"samples_per_second": 1.0, "share_of_bare": 0.9},
        "seconds": {"data": 1.0, "audit": 2.0}, "commands": [evil], "versions": {"goodfit": "0"},
        "time": {"shares": {"step": 0.75, "data": 0.25}, "seconds": {"step": 3.0, "data": 1.0}, "share_of_bare": 0.7,
                 "bottleneck": "data", "lever": evil}, "projection": evil,
        "checks": [{"name": evil, "passed": False, "evidence": evil, "meaning": evil}],
    }  # fmt: skip
    write_report(tmp_path / "report.html", facts, {})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 13
    assert "http://" not in page and "https://" not in page and "default-src 'none'" in page


def test_pictures_of_one_name_do_not_replace_each_other(tmp_path):
    from goodfit.api.predict import _Writer

    writer = _Writer([], tmp_path, detects=False)
    names = [writer._plain_name(path) for path in ("x/a.jpg", "x/a-2.jpg", "y/a.jpg", "z/a.png")]
    assert names == ["a", "a-2", "a-3", "a-4"]


@pytest.mark.parametrize("name", ["$5_$10", "_hidden", "plain", "a$b"])
def test_any_class_name_can_be_drawn(tmp_path, name):
    from goodfit.outcome.detection_plots import plot_confidence
    from goodfit.outcome.plots import plain, plot_confusion

    plot_confusion([[3, 1], [0, 2]], [name, "other"], tmp_path / "c.png")
    curve = {"precision": [1.0] * 99, "recall": [1.0] * 99, "f1": [1.0] * 99}
    plot_confidence({name: curve}, 0.5, tmp_path / "f.png")
    assert (tmp_path / "c.png").stat().st_size > 1000 and not plain(name).startswith("_")
