"""The stages after training: the final test, the bundle, the report. Each is skipped if its result is there."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from goodfit.api.assemble import PROBE_SAMPLES, TRAIN_SAMPLES, FitParts, ImageParts, Parts
from goodfit.api.detect_parts import DetectParts
from goodfit.api.folder import AUDIT, PLAN, Run, load_request
from goodfit.api.latency import typical_files
from goodfit.api.prepare import stage
from goodfit.api.verdict import compare_projection, judge_time
from goodfit.config.plan import Plan
from goodfit.core.errors import DataError
from goodfit.core.history import epochs_of, stage_found, stage_seconds, training_rate, validation_seconds
from goodfit.core.journal import Journal
from goodfit.core.random import permutation, stream
from goodfit.core.safeio import read_json, write_json
from goodfit.data.checks.audit import changed_files
from goodfit.data.index import DatasetIndex, data_hash
from goodfit.data.reading import How
from goodfit.data.split import SealedTest, subset
from goodfit.engine.checkpoint import Checkpoints, tensors_sha256
from goodfit.engine.device import DevicePolicy, is_out_of_memory
from goodfit.engine.evaluate import evaluate
from goodfit.metrics.classification import ClassificationMeter
from goodfit.models.builder import build_network
from goodfit.outcome.baselines import ProbeResult, backbone_features, linear_probe, majority_class
from goodfit.outcome.bundle import Served, library_versions, write_bundle
from goodfit.outcome.finaltest import final_result
from goodfit.outcome.ledger import count_look
from goodfit.outcome.lr_plot import plot_lr_range, plot_schedule
from goodfit.outcome.plots import plot_batch, plot_confusion, plot_results
from goodfit.outcome.report import write_report
from goodfit.planning.projection import describe_outcome

_PARITY = stream("parity")
_PROBED = stream("probed")
NUM_PICTURES = 16
LR_RANGE = "lr_range.png"
LR = "lr.png"


def load_best(parts: ImageParts, checkpoints: Checkpoints) -> None:
    """Put the best weights of the run into the model, in float32."""
    parts.state.model.load_state_dict(checkpoints.load_best(parts.state.progress).evaluated)


def training_accuracy(run: Run, parts: Parts, journal: Journal) -> dict[str, float]:
    """Measure the best model on training images as the test will: without augmentation, mixing or dropout, in float32.

    What training itself could count would be of distorted and mixed pictures, and of a model that changed meanwhile; only
    this figure can be compared with validation's.

    Returns:
        Loss, accuracy and macro F1 of a fixed, stratified sample, and `n`, its images.
    """
    done = training_metrics(run)
    if done:
        return done
    with stage(journal, "gap") as note:
        rows = training_sample(parts.index, parts.plan)
        meter = evaluate(parts.state.model, parts.eval_loader(rows), task=parts.task, transform=parts.context.transform,
                         device=precisely(parts.plan), ranks=parts.context.ranks)  # fmt: skip
        assert isinstance(meter, ClassificationMeter)
        found = {**meter.compute(), "n": len(rows)}
        note.text = describe_gap(found, parts.state.progress.best)
        note.fields = {"train": found}
    return found


def training_sample(index: DatasetIndex, plan: Plan) -> npt.NDArray[np.int64]:
    """At most 1,000 rows of those that the plan trains on (or one of each class), stratified: the same ones in every run
    on this split."""
    share = max(1, TRAIN_SAMPLES - len(index.class_names)) / len(index.rows("train"))  # each class is rounded up
    return subset(index, min(plan.fraction.value, share), plan.split_seed.value)


def training_metrics(run: Run) -> dict[str, float]:
    """What `training_accuracy` found for a run's weights; empty before."""
    return stage_found(run.events, "gap", "train")


def describe_gap(train: dict[str, float], best: dict[str, Any] | None) -> str:
    """Training accuracy beside that of validation, in one line."""
    text = f"train acc {100 * train['accuracy']:.1f} % on {train['n']:,} training images as they are served"
    if not best:
        return text
    val = best["metrics"]["accuracy"]
    return f"{text} · val {100 * val:.1f} % · gap {100 * (train['accuracy'] - val):+.1f} points"


def precisely(plan: Plan) -> DevicePolicy:
    """The plan's device in float32: what is tested and served."""
    return DevicePolicy(kind=plan.device.value, precision="fp32", channels_last=plan.channels_last.value)


def open_test(run: Run, parts: ImageParts) -> tuple[SealedTest, npt.NDArray[np.int64]]:
    """The seal of a run's test split and its rows, for the final test.

    Raises:
        DataError: the split is not the one that was sealed, or its files changed since.
    """
    sealed = SealedTest(read_json(run.path / AUDIT)["data"]["test_sha256"])
    rows = sealed.open(parts.index)
    changed = changed_files(parts.index, rows)
    if changed:
        raise DataError(f"{len(changed)} files of the test split changed since it was sealed (first: {changed[0]}).",
                        where=str(parts.index.root), kept="the trained weights, in checkpoints/best; no look was counted",
                        next="put the files back, then goodfit resume RUN")  # fmt: skip
    return sealed, rows


def final_test(run: Run, parts: Parts, journal: Journal) -> dict[str, Any]:
    """Open the sealed split, count the look, test the model in float32 as it will be served, and write test.json.

    Raises:
        DataError: the test split is not the one that was sealed, or its files changed.
    """
    with stage(journal, "test") as note:
        sealed, rows = open_test(run, parts)
        model = parts.state.model
        digest = tensors_sha256({"": dict(model.state_dict())})
        look = count_look(run.path, sealed.sha256, weights_sha256=digest)
        precise = precisely(parts.plan)
        meter = evaluate(model, parts.eval_loader(rows), task=parts.task, transform=parts.context.transform,
                         device=precise, ranks=parts.context.ranks)  # fmt: skip
        assert isinstance(meter, ClassificationMeter)
        probe, what = _probe_if_it_fits(run, parts, rows, precise)
        index = parts.index
        result = final_result(meter, class_names=index.class_names, look=look, probe=probe, probe_reason=what,
                              majority=majority_class(index.targets[index.rows("train")]),
                              targets=index.targets[rows])  # fmt: skip
        result["no_probe"] = "" if probe is not None else what
        write_json(run.path / "test.json", result)
        journal.emit(
            "test", **{k: result[k] for k in ("n", "look", "accuracy", "low", "high", "macro_f1", "baselines")}
        )
        note.text = describe_test(result)
    return result


def describe_test(result: dict[str, Any]) -> str:
    """The final test in one line."""
    probe = result["baselines"]["linear_probe"]
    beside = (
        f" · linear probe {100 * probe['accuracy']:.1f} %"
        if probe
        else f" · no linear probe: {result['no_probe']}"
        if result.get("no_probe")
        else ""
    )
    return (
        f"acc {100 * result['accuracy']:.1f} % ({100 * result['low']:.1f}–{100 * result['high']:.1f}, n = {result['n']}) · "
        f"majority class {100 * result['baselines']['majority']['accuracy']:.1f} %{beside} · "
        f"look {result['look']} on this test set"
    )


def _probe_if_it_fits(
    run: Run, parts: Parts, test_rows: npt.NDArray[np.int64], device: DevicePolicy
) -> tuple[ProbeResult | None, str]:
    """The probe, or why there is none: a comparison must cost neither the test that it stands beside nor much of a time."""
    if not parts.probes(validation_seconds(run.events) / len(parts.val.rows)):
        return None, "left out: it would have taken a large part of the time that the run was given"
    try:
        return _probe(parts, test_rows, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        device.hand_back()
        return None, "memory ran out"


def _probe(parts: Parts, test_rows: npt.NDArray[np.int64], device: DevicePolicy) -> tuple[ProbeResult | None, str]:
    """A linear probe on the backbone as it was before training."""
    network, _ = build_network(parts.plan, parts.index.class_names)
    if not hasattr(network, "forward_head"):
        return None, "this network has no separate head"
    network = device.place(network)

    def features(rows: npt.NDArray[np.int64]) -> torch.Tensor:
        batches = (parts.context.transform.evaluate(device.move(m.data))["image"] for m in parts.eval_loader(rows))
        return backbone_features(network, batches)

    index = parts.index
    plan, val = parts.plan, index.rows("val")
    train = subset(index, min(plan.fraction.value, PROBE_SAMPLES / len(index.rows("train"))), plan.split_seed.value)
    val = val[permutation(len(val), _PROBED, plan.split_seed.value)[:PROBE_SAMPLES]]
    probe = linear_probe((features(train), index.targets[train]), (features(val), index.targets[val]),
                         features(test_rows), len(index.class_names))  # fmt: skip
    few = f", on {len(train):,} training images" if len(train) < len(parts.train.rows) else ""
    start = "pretrained" if plan.pretrained.value != "false" else "randomly initialised"
    return probe, f"logistic regression on the frozen, {start} {plan.model.value}{few}"


def bundle_stage(run: Run, parts: Parts, journal: Journal, test: dict[str, Any]) -> dict[str, Any]:
    """Export, prove and write the bundle.

    Raises:
        ExportError: the exported model does not reproduce the trained one, or is over the latency limit.
    """
    if (run.bundle / "bundle.json").is_file() and (run.bundle / "manifest.json").is_file():
        return dict(read_json(run.bundle / "bundle.json"))
    with stage(journal, "bundle") as note:
        index, plan = parts.index, parts.plan
        val = index.rows("val")
        order = permutation(len(val), _PARITY, plan.seed.value)
        best = parts.state.progress.best
        card = {
            **parts.task.describe(),
            "model": plan.model.value,
            "licence": plan.weights.reason.removeprefix("licence: ")
            if plan.weights.value
            else "none: trained from scratch",
            "weights": plan.weights.value,
            "data_sha256": data_hash(index),
            "metrics": {"train": training_metrics(run), "val": best["metrics"] if best else {}, "test": test},
        }
        made = write_bundle(run.bundle, parts.state.model, preprocessing=parts.preprocessing, card=card,
                            plan=plan.to_dict(), images=[index.file(int(val[i])) for i in order], served=served_files(parts))  # fmt: skip
        parity, latency = made["parity"], made["latency"]
        note.text = (f"{run.bundle}  parity {parity['max_difference']:.0e} on {parity['num_files']} files · "
                     f"{describe_latency(latency)}")  # fmt: skip
    return made


def served_files(parts: ImageParts) -> Served:
    """Typical pictures of validation, with the threads and the limit of the plan."""
    plan = parts.plan
    costs = plan.measured.latencies if plan.measured is not None else ()
    planned = (c.p95 for c in costs if (c.model, c.imgsz) == (plan.model.value, plan.imgsz.value))
    return Served(files=typical_files(parts.index, parts.index.rows("val")), threads=plan.latency_threads.value,
                  limit=plan.latency.value, planned=next(planned, 0.0))  # fmt: skip


def describe_latency(latency: dict[str, Any]) -> str:
    """One image as it is served, in a line."""
    text = f"{latency['p50_ms']:.1f} ms an image (p95 {latency['p95_ms']:.1f})"
    return f"{text}, {latency['verdict']}" if latency.get("verdict") else text


def picture_stage(
    run: Run, parts: Parts | DetectParts, journal: Journal, draw: Callable[..., None] = plot_batch
) -> None:
    """Draw train_batch.png and val_batch.png: the very tensors that the model sees, with their labels; lr.png, the planned
    learning rates; and the range test's curve, where there was one.

    Args:
        draw: Of a batch, the class names, the preprocessing and the file.
    """
    with stage(journal, "pictures") as note:
        plots = run.path / "plots"
        plots.mkdir(exist_ok=True)
        context, names = parts.context, parts.index.class_names
        micro = parts.train.group(0, 0, parts.state.progress.num_micro)[0]
        keys: dict[str, Any] = {"epoch": 0, "step": 0, "rank": 0, "micro": 0, "closing": False}
        train = context.transform.train(context.device.move(micro.data), samples=micro.samples, **keys)
        few = next(iter(parts.eval_loader(parts.val.rows[:NUM_PICTURES])))
        val = context.transform.evaluate(context.device.move(few.data))
        for name, batch in (("train", train), ("val", val)):
            draw(batch, names, parts.preprocessing, plots / f"{name}_batch.png")
        peaks: dict[float, list[str]] = {}
        for group in parts.state.optimizer.param_groups:
            peaks.setdefault(group["peak_lr"], []).append(group["name"])
        plot_schedule(parts.state.progress.schedule, {", ".join(dict.fromkeys(names)): lr for lr, names in peaks.items()},
                      parts.train.steps_per_epoch, plots / LR)  # fmt: skip
        measured = parts.plan.measured
        if measured is not None and measured.lr_range is not None and measured.lr_range.losses:
            plot_lr_range(measured.lr_range, plots / LR_RANGE)
        note.text = str(plots / "train_batch.png")


def report_stage(run: Run, parts: Parts, journal: Journal, test: dict[str, Any], bundle: dict[str, Any]) -> None:
    """Draw the pictures and write report.html."""
    with stage(journal, "report") as note:
        plots = run.path / "plots"
        plots.mkdir(exist_ok=True)
        events = run.events
        epochs = epochs_of(events)
        plot_results(epochs, plots / "results.png")
        plot_confusion(test["confusion"], parts.index.class_names, plots / "confusion_matrix.png")
        audit = read_json(run.path / AUDIT)
        probe = test["baselines"]["linear_probe"]
        rows = [{"name": "this model", "what": parts.plan.model.value, **test}]
        rows += [{"name": n.replace("_", " "), **r} for n, r in test["baselines"].items() if r]
        best = parts.state.progress.best or {}
        gap = {"train": training_metrics(run), "val": best.get("metrics", {}), "test": test}
        facts = {
            "name": run.path.name, "data": audit["data"], "findings": audit["findings"],
            "decisions": parts.plan.to_dict()["decisions"], "test": test, "comparison": rows, "bundle": bundle,
            "gain": test["accuracy"] - probe["accuracy"] if probe else None,
            "training": f"{len(epochs)} epochs, {parts.state.progress.step} steps; the best state is that of epoch "
                        f"{best.get('epoch', 0) + 1}; {len(parts.state.progress.skipped)} updates left out.",
            "gap": {name: found for name, found in gap.items() if found}, "rate": rate(run, parts),
            "seconds": stage_seconds(events), "commands": commands(run),
            "versions": library_versions(), "time": judge_time(run, parts).to_dict(),
            "projection": describe_outcome(**compare_projection(run)),
            "checks": [c for e in events if e["event"] == "stage" for c in e.get("checks", ())],
        }  # fmt: skip
        write_report(run.path / "report.html", facts,
                     {"results": plots / "results.png", "confusion": plots / "confusion_matrix.png",
                      "lr_range": plots / LR_RANGE, "lr": plots / LR})  # fmt: skip
        note.text = str(run.path / "report.html")


def rate(run: Run, parts: FitParts) -> dict[str, float]:
    """Samples per second of training, and its share of the bare step that the rehearsal measured (0 without one), inputs of several
    sizes weighed by their pixels."""
    return {
        "samples_per_second": training_rate(run.events),
        "share_of_bare": judge_time(run, parts).share_of_bare or 0.0,
    }


def commands(run: Run) -> list[str]:
    """How to do it again, from the command line and from Python."""
    request = load_request(run.path)
    reading = [f.name for f in fields(How)] + ["labels", "twins"]  # the plan does not hold how to read
    asked = {name: getattr(request, name) for name in reading if getattr(request, name) is not None}
    asked["plan"] = str(run.path / PLAN)
    words = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in asked.items())
    keywords = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    return [
        f"goodfit train {shlex.quote(request.data or '')} {words}",
        f"goodfit.train({request.data!r}, {keywords})",
        f"goodfit predict {shlex.quote(str(run.bundle))} IMAGE...",
    ]


def write_result(run: Run, parts: Parts, checkpoints: Checkpoints, test: dict[str, Any]) -> dict[str, Any]:
    """Write result.json, what `json=true` prints."""
    progress = parts.state.progress
    last = checkpoints.latest()
    assert last is not None
    probe = test["baselines"]["linear_probe"]
    events = run.events
    result = {
        "status": "done",
        "task": parts.plan.task.value,
        "run": str(run.path),
        "bundle": str(run.bundle),
        "epochs": len(epochs_of(events)),
        "steps": progress.step,
        "metrics": {
            "train": training_metrics(run),
            "val": progress.best["metrics"] if progress.best else {},
            "test": {k: test[k] for k in ("n", "low", "high", "look", "accuracy", "macro_f1", "loss")},
        },
        "baselines": {
            "majority": test["baselines"]["majority"]["accuracy"],
            "linear_probe": probe["accuracy"] if probe else None,
        },
        "weights_sha256": tensors_sha256({"": load_file(str(run.bundle / "model.safetensors"))}),
        "state_sha256": tensors_sha256(last.files),
        "rate": rate(run, parts),
        "seconds": stage_seconds(events),
        "utilisation": judge_time(run, parts).to_dict(),
        "projection": compare_projection(run),
        "latency": read_json(run.bundle / "bundle.json")["latency"],
    }
    write_json(run.path / "result.json", result)
    return result
