"""The stages after a module was trained: its best weights, the test, the report. Each is skipped if its result is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from goodfit.api.finish import rate
from goodfit.api.folder import PLAN, RUN_FACTS, Run
from goodfit.api.module_parts import ModuleParts
from goodfit.api.prepare import stage
from goodfit.api.verdict import compare_projection, judge_time
from goodfit.config.module import decided
from goodfit.core.history import epochs_of, stage_seconds
from goodfit.core.journal import Journal
from goodfit.core.safeio import read_json, write_bytes, write_json
from goodfit.data.samples import TensorSamples
from goodfit.engine.checkpoint import Checkpoints, tensors_sha256
from goodfit.engine.device import DevicePolicy
from goodfit.engine.evaluate import evaluate
from goodfit.metrics.classification import wilson_interval
from goodfit.metrics.means import MeanMeter
from goodfit.outcome.bundle import library_versions
from goodfit.outcome.ledger import count_look
from goodfit.outcome.plots import plot_results
from goodfit.outcome.report import write_report
from goodfit.planning.projection import describe_outcome

WEIGHTS = "model.safetensors"


def finish_module(run: Run, module: nn.Module, parts: ModuleParts, checkpoints: Checkpoints, journal: Journal) -> Run:
    """From trained weights to a finished run, and the weights into the module that was handed over."""
    weights = checkpoints.load_best(parts.state.progress).evaluated
    parts.state.model.load_state_dict(weights)
    write_bytes(run.path / WEIGHTS, save(weights))
    done = run.path / "test.json"
    test = read_json(done) if done.is_file() else _test(run, parts, journal)
    _report(run, parts, journal, test)
    _write_result(run, parts, checkpoints, test)
    module.load_state_dict(weights)
    module.eval()
    journal.emit("done", path=str(run.path))
    return run


def load_finished(run: Run, module: nn.Module) -> None:
    """Put the weights of a finished run into a module of its kind, in evaluation mode."""
    module.load_state_dict(load_file(str(run.path / WEIGHTS)))
    module.eval()


def _test(run: Run, parts: ModuleParts, journal: Journal) -> dict[str, Any]:
    """Count the look, test the best weights in float32, write test.json. Empty where no test split was given."""
    samples = parts.splits.test
    if samples is None:
        return {}
    with stage(journal, "test") as note:
        sealed = read_json(run.path / RUN_FACTS)["data"]["test"]
        digest = tensors_sha256({"": dict(parts.state.model.state_dict())})
        look = count_look(run.path, sealed["sha256"], weights_sha256=digest)
        precise = DevicePolicy(
            kind=parts.plan.device.value, precision="fp32", channels_last=parts.plan.channels_last.value
        )
        meter = evaluate(parts.state.model, parts.reader(samples), task=parts.task, transform=parts.context.transform,
                         device=precise, ranks=parts.context.ranks)  # fmt: skip
        assert isinstance(meter, MeanMeter)
        figures, num = meter.compute(), len(samples)
        result: dict[str, Any] = {"n": num, "look": look, **figures}
        if "accuracy" in figures and meter.counts()["accuracy"] == num:  # one answer a sample: they are independent
            result["low"], result["high"] = wilson_interval(round(figures["accuracy"] * num), num)
            result["interval"] = "95 % Wilson score interval of the accuracy"
        whole = isinstance(samples, TensorSamples)
        result["sealed"] = "by the hash of all samples" if whole else "by the hash of its number, first and last sample"
        write_json(run.path / "test.json", result)
        journal.emit("test", **result)
        shown = " · ".join(f"{name} {value:.4g}" for name, value in figures.items())
        interval = f" (accuracy {result['low']:.3f}–{result['high']:.3f})" if "low" in result else ""
        note.text = f"{shown}{interval} · n = {num:,} · look {look} on this test set"
    return result


def _report(run: Run, parts: ModuleParts, journal: Journal, test: dict[str, Any]) -> None:
    """Draw the curves and write report.html."""
    with stage(journal, "report") as note:
        plots = run.path / "plots"
        plots.mkdir(exist_ok=True)
        events = run.events
        epochs = epochs_of(events)
        plot_results(epochs, plots / "results.png")
        progress = parts.state.progress
        best = progress.best or {}
        figures = ("n", "look", "low", "high", "interval", "sealed")
        facts = {
            "name": run.path.name, "splits": {name: len(samples) for name, samples in parts.splits.named().items()},
            "format": parts.splits.train.format, "findings": [], "gap": {}, "test": test, "rate": rate(run, parts),
            "figures": {name: {"val": value, "test": test.get(name)} for name, value in best.get("metrics", {}).items()
                        if name not in figures},
            "warnings": [e["text"] for e in events if e["event"] == "warning"],
            "decisions": {n: {"value": d.value, "source": d.source, "reason": d.reason} for n, d in decided(parts.plan).items()},
            "training": f"{len(epochs)} epochs, {progress.step} steps; the best state is that of epoch "
                        f"{best.get('epoch', 0) + 1}; {len(progress.skipped)} updates left out.",
            "seconds": stage_seconds(events), "commands": _commands(run), "versions": library_versions(),
            "time": judge_time(run, parts).to_dict(), "projection": describe_outcome(**compare_projection(run)),
            "checks": [c for e in events if e["event"] == "stage" for c in e.get("checks", ())], "bundle": {},
        }  # fmt: skip
        pictures: dict[str, Path] = {"results": plots / "results.png"}
        write_report(run.path / "report.html", facts, pictures, template="module.html")
        note.text = str(run.path / "report.html")


def _commands(run: Run) -> list[str]:
    """How to go on from Python."""
    return [
        f"goodfit.fit(module, train, val, ..., plan={str(run.path / PLAN)!r})      # the same again",
        f"module.load_state_dict(safetensors.torch.load_file({str(run.path / WEIGHTS)!r}))",
    ]


def _write_result(run: Run, parts: ModuleParts, checkpoints: Checkpoints, test: dict[str, Any]) -> None:
    """Write result.json."""
    progress = parts.state.progress
    last = checkpoints.latest()
    assert last is not None
    events = run.events
    weights: dict[str, torch.Tensor] = load_file(str(run.path / WEIGHTS))
    result = {
        "status": "done", "task": "module", "run": str(run.path), "weights": str(run.path / WEIGHTS), "bundle": None,
        "epochs": len(epochs_of(events)), "steps": progress.step,
        "metrics": {"val": progress.best["metrics"] if progress.best else {},
                    "test": {k: v for k, v in test.items() if k not in ("interval", "sealed")}},
        "baselines": {}, "weights_sha256": tensors_sha256({"": weights}), "state_sha256": tensors_sha256(last.files),
        "rate": rate(run, parts), "seconds": stage_seconds(events), "utilisation": judge_time(run, parts).to_dict(),
        "projection": compare_projection(run),
    }  # fmt: skip
    write_json(run.path / "result.json", result)
