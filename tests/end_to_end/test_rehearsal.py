"""The rehearsal: each planted bug is named by its own check, and sound configurations raise no alarm."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image

import plants
from goodfit.api.assemble import execution
from goodfit.api.rehearse import export_problem, rehearsal_stage
from goodfit.core.journal import Journal, read_lines
from goodfit.engine.checkpoint import tensors_sha256
from goodfit.engine.optimizer import optimizer_tensors
from plants import (
    BUGS,
    NAMES,
    SOUND,
    CountOfBatch,
    CountOfOne,
    Deciding,
    Detached,
    DividedTwice,
    DropsOut,
    Forgetful,
    MeanNotSum,
    MeanOfBatch,
    NeverEvaluating,
    OtherLabelsEveryStep,
    Plain,
    SeesNothing,
    ShiftedInLoss,
    ShiftedTransform,
    Softmaxed,
    SoftmaxInLoss,
    Wrapped,
    collated_otherwise,
    folders,
    parts_of,
    run,
)


def alarms(parts, **planted):
    """The names of the checks that fail, and the whole message."""
    found, error = plants.alarms(parts, **planted)
    assert error is not None and "rehearse=false" in error.next and error.kept == "nothing was trained"
    assert all(f"{name}: " in error.message for name in found)
    return found, str(error)


# Planted bugs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(bars):
    """A sound run of resnet10t, to plant bugs around; nothing in it is changed."""
    return parts_of(bars)


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_shifted_by_one_are_named(sound, shift):
    parts = collated_otherwise(sound, lambda images, targets: (images, np.roll(targets, shift)))
    found, text = alarms(parts)
    assert found == {"labels"} and "shifted by one" in text and "`target`" in text


def test_pictures_shifted_by_one_are_named(sound):
    parts = collated_otherwise(sound, lambda images, targets: (np.roll(images, 1, axis=0), targets))
    found, text = alarms(parts)
    assert found == {"labels"} and "pictures are shifted by one" in text


def test_labels_shifted_in_the_transform_or_the_loss_are_named(sound):
    found, text = alarms(sound, transform=ShiftedTransform(sound.context.transform))
    assert found == {"labels"} and "after the training transform" in text
    assert alarms(sound, task=ShiftedInLoss(sound.task))[0] >= {"loss and evaluation agree"}


def test_softmax_twice_is_named(sound):
    found, text = alarms(sound, wrap=Softmaxed)
    assert found == {"outputs"} and "already probabilities" in text
    found, text = alarms(sound, task=SoftmaxInLoss(sound.task))
    assert found == {"outputs"} and "twice" in text


def test_frozen_layers_are_named(sound):
    found, text = alarms(sound, wrap=lambda model: Wrapped(model).requires_grad_(False))
    assert found == {"gradients"} and "are frozen" in text
    sound.state.model.requires_grad_(True)
    found, text = alarms(sound, wrap=Detached)
    assert found == {"gradients"} and "none for net.conv1" in text


def test_parameters_that_the_optimizer_was_not_given_are_named(sound):
    def forgetful(model):
        optimizer = sound.optimizer_for(model)
        del optimizer.param_groups[0]["params"][0]
        return optimizer

    found, text = alarms(sound, build=forgetful)
    assert found == {"gradients"} and "not in the optimizer: conv1" in text


@pytest.mark.parametrize("wrong", [NeverEvaluating, DropsOut])
def test_evaluation_in_training_mode_is_named(sound, wrong):
    found, text = alarms(sound, wrap=wrong)
    assert found == {"evaluation mode"} and "stay in training mode" in text


def test_a_learning_rate_of_zero_is_named(bars, sound):
    found, text = alarms(parts_of(bars, lr=0.0, head_lr=0.0))
    assert found == {"learning rate"} and "is 0 at its peak" in text

    def idle(model):
        optimizer = sound.optimizer_for(model)
        optimizer.step = lambda: None
        return optimizer

    found, text = alarms(sound, build=idle)
    assert found == {"learning rate"} and "0 of" in text


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), "nearly the same"),  # figures for 0..255, pixels of 0..1
        ((0.485, 0.456, 0.406), (58.4, 57.1, 57.4), "nearly the same"),
        ((0.0019, 0.0018, 0.0016), (0.0009, 0.0009, 0.0009), "too large"),  # not divided by 255
        ((123.7, 116.3, 103.5), (0.229, 0.224, 0.225), "lies outside"),
    ],
)
def test_a_wrong_normalisation_is_named(sound, mean, std, said):
    transform = sound.context.transform
    wrong = dataclasses.replace(transform.preprocessing, mean=mean, std=std)
    found, text = alarms(sound, transform=dataclasses.replace(transform, preprocessing=wrong))
    assert "normalisation" in found and found <= {"normalisation", "loss at start"}
    assert said in text and "spread" in text


def test_a_training_transform_that_normalises_otherwise_is_named(sound):
    found, text = alarms(sound, transform=DividedTwice(sound.context.transform))
    assert found == {"normalisation"} and "lose their contrast" in text


@pytest.mark.parametrize(("wrong", "what"), [(MeanNotSum, "sum"), (CountOfOne, "sum"), (CountOfBatch, "count")])
def test_a_loss_averaged_wrongly_is_named(sound, wrong, what):
    found, text = alarms(sound, task=wrong(sound.task))
    assert "loss sums" in found and found <= {"loss sums", "loss at start"} and f"the {what} of the term" in text


def test_samples_that_see_each_other_are_named(sound):
    found, text = alarms(sound, wrap=MeanOfBatch)
    assert "samples apart" in found and found <= {"samples apart", "loss sums"}
    assert "gradient on other samples' inputs" in text


def test_a_model_that_does_not_see_its_input_is_named(sound):
    found, _ = alarms(sound, wrap=SeesNothing)
    assert "better than blind" in found and found <= {"better than blind", "overfit a few samples"}


def test_state_that_is_not_saved_is_named(sound):
    assert alarms(sound, wrap=Forgetful)[0] == {"save, load, predict"}


def test_a_subset_that_does_not_train_is_named(sound):
    found, text = alarms(sound, transform=OtherLabelsEveryStep(sound.context.transform))
    assert found == {"subset run"} and "72 steps" in text


def test_a_network_that_cannot_be_exported_is_named(sound):
    found, text = alarms(sound, wrap=Deciding, export=lambda model: export_problem(sound, model))
    assert found == {"export"} and "cannot be traced" in text


def test_the_seven_bugs_of_the_benchmark_are_named(sound):
    for name, (plant, check) in BUGS.items():
        parts, planted = plant(sound)
        assert check in alarms(parts, **planted)[0], name
    assert all(p.requires_grad for p in sound.state.model.parameters())


# Sound configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUND)
def test_sound_configurations_raise_no_alarm(tmp_path, name):
    kind, classes, counts, asked = SOUND[name]
    found = run(parts_of(folders(tmp_path / "data", kind, classes, counts), **asked))
    assert [c.name for c in found.checks] == list(NAMES) and all(c.passed for c in found.checks)
    assert found.describe().endswith(f"{len(NAMES)} checks") and found.describe().count(" · ") == 3
    assert found.bare_rate > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_without_batch_norm_and_partly_frozen_is_sound(sound, precision):
    torch.manual_seed(0)
    made = Plain(3)
    device = dataclasses.replace(sound.context.device, precision=precision)
    found = run(sound, wrap=lambda _: made, device=device)
    (gradients,) = [c for c in found.checks if c.name == "gradients"]
    assert "none for token" in gradients.evidence and "2 frozen" in gradients.evidence


def test_tiny_digits_are_sound(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    images, targets = datasets.load_digits(return_X_y=True)
    for number in range(200):
        (tmp_path / "digits" / str(targets[number])).mkdir(parents=True, exist_ok=True)
        pixels = (images[number].reshape(8, 8) * 15.9).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "digits" / str(targets[number]) / f"{number}.png")
    assert run(parts_of(tmp_path / "digits")).checks


# What it leaves behind ------------------------------------------------------------------------------------------------


def test_the_rehearsal_changes_nothing_of_the_run(sound, tmp_path):
    def everything():
        state = sound.state
        noise = {"torch": torch.get_rng_state()}
        tensors = {"model": dict(state.model.state_dict()), "optimizer": optimizer_tensors(state.optimizer)}
        modes = [module.training for module in state.model.modules()]
        rates = [group["lr"] for group in state.optimizer.param_groups]
        return (tensors_sha256({**tensors, "noise": noise}), modes, rates, state.progress.to_dict(),
                repr(np.random.get_state()), random.getstate(), [p.grad for p in state.model.parameters()])  # fmt: skip

    with execution(sound.plan):
        before = everything()
        journal = Journal(tmp_path / "events.jsonl")
        rehearsal_stage(sound, journal)
        assert everything() == before
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert [c["name"] for c in event["checks"]] == list(NAMES)
    assert all(c["passed"] is True and c["evidence"] and c["meaning"] for c in event["checks"])
    assert event["bare_rate"] > 0 and "\n" not in event["text"] and f"{len(NAMES)} checks" in event["text"]
