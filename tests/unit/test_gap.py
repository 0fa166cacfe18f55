"""The training images that the finished model is measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from goodfit.api.finish import TRAIN_SAMPLES, describe_gap, training_sample
from goodfit.data.index import DatasetIndex
from goodfit.data.split import subset
from plans import plan_of


def index_of(counts, seed=0):
    """So many training rows of each class, and as many of validation and test."""
    targets = np.concatenate([np.repeat(np.arange(len(counts)), counts)] * 3)
    contents = np.random.default_rng(seed).integers(0, 256, (len(targets), 16), dtype=np.uint8)
    return DatasetIndex(root=Path(), paths=[f"{n}.png" for n in range(len(targets))], targets=targets,
                        class_names=tuple(f"c{c:04d}" for c in range(len(counts))),
                        splits=np.repeat(np.arange(3, dtype=np.int8), sum(counts)),
                        groups=np.full(len(targets), -1), contents=contents)  # fmt: skip


@pytest.mark.parametrize("counts", [[3000, 900, 100, 3], [400, 300], [5, 5], [30] * 90, [2] * 1500])
def test_the_sample_is_stratified_and_not_over_a_thousand(counts):
    index = index_of(counts)
    rows = training_sample(index, plan_of())
    assert len(rows) <= max(TRAIN_SAMPLES, len(counts)) and set(rows) <= set(index.rows("train"))
    found = np.bincount(index.targets[rows], minlength=len(counts))
    assert found.min() >= 1 and (np.abs(found - len(rows) * np.array(counts) / sum(counts)) <= 2).all()
    assert len(rows) == sum(counts) if sum(counts) <= TRAIN_SAMPLES - len(counts) else len(rows) > 0.7 * TRAIN_SAMPLES
    assert np.array_equal(rows, training_sample(index, plan_of(seed=7))), "the same in every run on the split"


def test_the_sample_is_of_what_was_trained_on():
    index = index_of([3000, 900])
    plan = plan_of(fraction=0.1)
    assert np.array_equal(training_sample(index, plan), subset(index, 0.1, plan.split_seed.value))
    plan = plan_of(fraction=0.8)
    assert set(training_sample(index, plan)) <= set(subset(index, 0.8, plan.split_seed.value))


def test_the_gap_in_words():
    train = {"accuracy": 0.991, "loss": 0.1, "macro_f1": 0.98, "n": 1000}
    assert describe_gap(train, None) == "train acc 99.1 % on 1,000 training images as they are served"
    assert describe_gap(train, {"metrics": {"accuracy": 0.92}}).endswith("served · val 92.0 % · gap +7.1 points")
