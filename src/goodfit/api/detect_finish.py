"""The stages of a detector after training: threshold, the final test, the bundle, the report. Each is skipped if its result is there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

from goodfit.api import finish
from goodfit.api.detect_decide import shown_decisions
from goodfit.api.detect_parts import JUDGED, DetectParts
from goodfit.api.finish import commands, describe_latency, open_test, precisely, rate, served_files
from goodfit.api.folder import AUDIT, Run
from goodfit.api.prepare import stage
from goodfit.api.verdict import compare_projection, judge_time
from goodfit.core.history import epochs_of, stage_found, stage_seconds
from goodfit.core.journal import Journal
from goodfit.core.random import permutation, stream
from goodfit.core.safeio import read_json, write_json
from goodfit.data.index import data_hash
from goodfit.data.objects import objects_of
from goodfit.engine.checkpoint import Checkpoints, tensors_sha256
from goodfit.engine.evaluate import evaluate
from goodfit.metrics.coco import AREAS, ImageObjects, evaluate_coco
from goodfit.metrics.detection import (
    DetectionMeter,
    ap_interval,
    choose_threshold,
    confidence_curve,
    confusion_matrix,
)
from goodfit.models.detection.family import Family
from goodfit.outcome.baselines import constant_objects
from goodfit.outcome.bundle import DETECT_SCRIPT, TORCH_SCRIPT, Exporter, library_versions, write_bundle
from goodfit.outcome.detection_plots import most_mistakes, plot_confidence, plot_found, plot_mistakes, plot_scenes
from goodfit.outcome.detector_export import Unsteady, check_detector_parity, export_detector
from goodfit.outcome.export import NotExportable
from goodfit.outcome.ledger import count_look
from goodfit.outcome.plots import plot_confusion, plot_results
from goodfit.outcome.report import write_report
from goodfit.outcome.torch_predictor import TorchPredictor, check_torch_bundle, no_export
from goodfit.planning.projection import describe_outcome

_PARITY = stream("parity")
BY_TORCH = {"needs": "torch"}
_TORCH = Exporter(no_export, check_torch_bundle, TORCH_SCRIPT, TorchPredictor)
CONSTANT = "the boxes most like those of training, given for every picture"
SHOWN = ("ap", "ap50", "ap75")
MASKS = ("mask_ap", "mask_ap50", "mask_ap75")


def picture_stage(run: Run, parts: DetectParts, journal: Journal) -> None:
    """As that of pictures with one class each, with the boxes and masks of the objects."""
    finish.picture_stage(run, parts, journal, plot_scenes)


def _judged(meter: DetectionMeter) -> list[ImageObjects]:
    """What threshold, curves, confusion and mistakes go by: masks where there are some, else boxes."""
    return meter.masked or meter.images


def _judge(parts: DetectParts, rows: Any, *, keep: bool = False) -> DetectionMeter:
    """The model on some rows as it will be served, in float32. With `keep`, the meter keeps the masks found."""
    task = parts.task.keeping() if keep else parts.task
    meter = evaluate(parts.state.model, parts.eval_loader(rows), task=task, transform=parts.context.transform,
                     device=precisely(parts.plan), ranks=parts.context.ranks)  # fmt: skip
    assert isinstance(meter, DetectionMeter)
    return meter


def threshold_stage(run: Run, parts: DetectParts, journal: Journal) -> dict[str, Any]:
    """Choose on validation from which confidence an object is reported, and measure the best model on training pictures too.

    Returns:
        `threshold`, its `f1`, and `train`: the figures on training pictures, as they are served, and `n`, how many.
    """
    done = threshold_of(run)
    if done:
        return done
    with stage(journal, "threshold") as note:
        num = len(parts.index.class_names)
        judged = _judge(parts, parts.val.rows)
        threshold, f1 = choose_threshold(_judged(judged), num)
        plots = run.path / "plots"
        plots.mkdir(exist_ok=True)
        _plot_mistakes(parts, judged, threshold, plots)
        rows = parts.train.rows[:: max(1, len(parts.train.rows) // JUDGED)][:JUDGED]
        train = {**_judge(parts, rows).compute(), "n": len(rows)}
        best = parts.state.progress.best
        val = best["metrics"]["ap50"] if best else 0.0
        note.text = (f"objects from a confidence of {threshold:.2f} (F1 {f1:.3f} on validation) · AP50 {train['ap50']:.3f} on {len(rows)} training "
                     f"pictures as they are served, {val:.3f} on validation")  # fmt: skip
        found = {"threshold": threshold, "f1": f1, "train": train}
        note.fields = {"found": found}
    return found


def _plot_mistakes(parts: DetectParts, judged: DetectionMeter, threshold: float, folder: Path) -> None:
    """Of validation, not of the test split: who sees mistakes there mends by them."""
    rows, images = parts.val.rows, _judged(judged)
    shown = rows[most_mistakes(images, threshold)]
    plot_found(parts.index, shown, _judge(parts, shown, keep=True), threshold, folder / "found.png")
    plot_mistakes(parts.index, rows, images, threshold, folder)


def threshold_of(run: Run) -> dict[str, Any]:
    """What `threshold_stage` found for a run's weights; empty before."""
    return stage_found(run.events, "threshold", "found")


def final_test(run: Run, parts: DetectParts, journal: Journal) -> dict[str, Any]:
    """Open the sealed split, count the look, test the model in float32 as it will be served, and write test.json.

    Raises:
        DataError: the test split is not the one that was sealed, or its files changed.
    """
    with stage(journal, "test") as note:
        sealed, rows = open_test(run, parts)
        digest = tensors_sha256({"": dict(parts.state.model.state_dict())})
        look = count_look(run.path, sealed.sha256, weights_sha256=digest)
        meter = _judge(parts, rows)
        result = _result(meter, parts, threshold_of(run)["threshold"], look)
        result["baselines"] = {"constant": {"ap50": _constant_ap50(parts, rows, meter), "what": CONSTANT}}
        write_json(run.path / "test.json", result)
        journal.emit(
            "test",
            **{
                k: result[k]
                for k in (
                    "n",
                    "look",
                    *SHOWN,
                    *MASKS,
                    "low",
                    "high",
                    "ap50_low",
                    "ap50_high",
                    "mask_ap50_low",
                    "mask_ap50_high",
                )
                if k in result
            },
        )
        by_masks = (f" · masks AP50 {result['mask_ap50']:.3f} ({result['mask_ap50_low']:.3f}–{result['mask_ap50_high']:.3f}), "
                    f"AP {result['mask_ap']:.3f}") if "mask_ap" in result else ""  # fmt: skip
        note.text = (f"AP50 {result['ap50']:.3f} ({result['ap50_low']:.3f}–{result['ap50_high']:.3f}) · AP {result['ap']:.3f} "
                     f"({result['low']:.3f}–{result['high']:.3f}){by_masks} · n = {result['n']} images, {result['num_objects']} objects · "
                     f"the same boxes everywhere {result['baselines']['constant']['ap50']:.3f} · look {look} on this test set")  # fmt: skip
    return result


def _result(meter: DetectionMeter, parts: DetectParts, threshold: float, look: int) -> dict[str, Any]:
    """The content of test.json."""
    names, images, judged = parts.index.class_names, meter.images, _judged(meter)
    num, evaluation = len(names), meter.evaluation(most=meter.most)
    low50, high50 = ap_interval(images, num, 0.5, most=meter.most)
    low, high = ap_interval(images, num, None, most=meter.most)
    confusion = confusion_matrix(judged, num, threshold)
    counts = [sum(int(((i.true_classes == c) & ~i.crowd).sum()) for i in images) for c in range(num)]
    masked = _by_masks(meter) if meter.masks else {}
    curves = {names[c]: curve for c in range(num) if (curve := confidence_curve(judged, c)) is not None}
    rows = []
    for c, figures in enumerate(evaluation.by_class()):
        at = min(98, max(0, round(100 * threshold) - 1))
        curve = curves.get(names[c])
        point: dict[str, float | None] = {
            k: float(curve[k][at]) if curve is not None else 0.0 for k in ("precision", "recall", "f1")
        }
        if point["precision"] == 1 and point["recall"] == 0:  # nothing is found: curves begin there
            point["precision"] = None
        by_mask = {f"mask_{k}": v for k, v in masked["per_class"][c].items()} if masked else {}
        rows.append({"class": names[c], "objects": counts[c], **figures, **by_mask, **point})
    return {
        "n": len(images), "num_objects": sum(counts), "look": look, **meter.compute(), "low": low, "high": high,
        "ap50_low": low50, "ap50_high": high50, "interval": "95 % interval by the bootstrap over images", "coco": meter.evaluation().summary(), "most": meter.most,
        "areas": [list(a) for a in AREAS], "threshold": threshold, "per_class": rows, "confusion": confusion.tolist(),
        "curves": {n: {k: [round(float(v), 5) for v in values] for k, values in c.items()} for n, c in curves.items()},
        "judged_by": "masks" if masked else "boxes", **{k: v for k, v in masked.items() if k != "per_class"},
    }  # fmt: skip


def _constant_ap50(parts: DetectParts, rows: npt.NDArray[np.int64], meter: DetectionMeter) -> float:
    """AP50 of the boxes most like those of training, given for every picture: what a detector must beat to have looked at any."""
    index = parts.index
    assert index.sizes is not None
    found = [objects_of(index, int(row)) for row in parts.train.rows]
    learned = [~one.crowd for one in found]
    shares = [
        one.boxes[k] / np.tile(index.sizes[row], 2)
        for one, k, row in zip(found, learned, parts.train.rows, strict=True)
    ]
    classes = np.concatenate([one.classes[k] for one, k in zip(found, learned, strict=True)])
    boxes, scores, kinds = constant_objects(np.concatenate(shares), classes)
    guessed = [replace(image, boxes=boxes * np.tile(index.sizes[row], 2), scores=scores, classes=kinds)
               for image, row in zip(meter.images, rows, strict=True)]  # fmt: skip
    return max(0.0, evaluate_coco(guessed, len(index.class_names), by_size=False).summary()["ap50"])


def _by_masks(meter: DetectionMeter) -> dict[str, Any]:
    """What the masks were judged by: COCO's figures, those of each class, and the intervals of both."""
    evaluation = meter.evaluation(masks=True, most=meter.most)
    low50, high50 = ap_interval(meter.masked, meter.num_classes, 0.5, most=meter.most)
    low, high = ap_interval(meter.masked, meter.num_classes, None, most=meter.most)
    return {"mask_coco": meter.evaluation(masks=True).summary(), "per_class": evaluation.by_class(), "mask_low": low, "mask_high": high,
            "mask_ap50_low": low50, "mask_ap50_high": high50}  # fmt: skip


def bundle_stage(run: Run, parts: DetectParts, journal: Journal, test: dict[str, Any]) -> dict[str, Any]:
    """Export, prove and write the bundle.

    Raises:
        ExportError: the exported model does not find what the trained one does.
    """
    if (run.bundle / "bundle.json").is_file() and (run.bundle / "manifest.json").is_file():
        return dict(read_json(run.bundle / "bundle.json"))
    with stage(journal, "bundle") as note:
        index, plan, found = parts.index, parts.plan, threshold_of(run)
        val = index.rows("val")
        order = permutation(len(val), _PARITY, plan.seed.value)
        best = parts.state.progress.best
        shown = {k: v for k, v in test.items() if k != "curves"}
        card = {
            **parts.task.describe(), "threshold": found["threshold"], "model": plan.model.value,
            "licence": plan.weights.reason.removeprefix("licence: ") if plan.weights.value else "none: trained from scratch",
            "weights": plan.weights.value, "data_sha256": data_hash(index),
            "metrics": {"train": found["train"], "val": best["metrics"] if best else {}, "test": shown},
        }  # fmt: skip
        write = partial(write_bundle, run.bundle, parts.state.model, preprocessing=parts.preprocessing, plan=plan.to_dict(),
                        images=[index.file(int(val[i])) for i in order], served=served_files(parts))  # fmt: skip
        note.text = ""
        try:
            made = write(card={**card, **needs_of(parts.task.family)}, exporter=exporter_of(parts.task.family))
        except (Unsteady, NotExportable) as error:  # after hours of training: torch can serve what ONNX Runtime cannot
            note.text = f"served by torch: {error.message} "
            made = write(card={**card, **BY_TORCH}, exporter=_TORCH)
        parity = made["parity"]
        ties = f", but for those of {parity['num_ties']} files, where several tie" if parity.get("num_ties") else ""
        left = f" ({parity['num_left_out']} more hang on a rounding)" if parity.get("num_left_out") else ""
        note.text += (f"{run.bundle}  parity {parity['max_difference']:.0e} on {parity['num_files']} files{left}, {parity['num_objects']} objects "
                     f"alike{ties} · {describe_latency(made['latency'])}")  # fmt: skip
    return made


def needs_of(family: Family) -> dict[str, str]:
    """What a bundle's card says where the network does not become ONNX."""
    return {} if family.exports else BY_TORCH


def exporter_of(family: Family) -> Exporter:
    """How a network of a family is written and proven."""
    if not family.exports:
        return _TORCH
    return Exporter(
        lambda network, box, path: export_detector(network, box, family, path), check_detector_parity, DETECT_SCRIPT
    )


def report_stage(run: Run, parts: DetectParts, journal: Journal, test: dict[str, Any], bundle: dict[str, Any]) -> None:
    """Draw the pictures and write report.html."""
    with stage(journal, "report") as note:
        plots = run.path / "plots"
        plots.mkdir(exist_ok=True)
        events, names = run.events, [*parts.index.class_names, "background"]
        epochs = epochs_of(events)
        plot_results(epochs, plots / "results.png")
        plot_confusion(test["confusion"], names, plots / "confusion_matrix.png")
        plot_confidence(test["curves"], test["threshold"], plots / "confidence.png")
        audit, best = read_json(run.path / AUDIT), parts.state.progress.best or {}
        gap = {"train": threshold_of(run)["train"], "val": best.get("metrics", {}), "test": test}
        decisions = {
            n: {"value": d.value, "source": d.source, "reason": d.reason}
            for n, d in shown_decisions(parts.plan).items()
        }
        facts = {
            "name": run.path.name, "data": audit["data"], "findings": audit["findings"], "decisions": decisions, "test": test,
            "bundle": bundle, "training": f"{len(epochs)} epochs, {parts.state.progress.step} steps; the best state is that of epoch "
            f"{best.get('epoch', 0) + 1}; {len(parts.state.progress.skipped)} updates left out.",
            "gap": {}, "figures": {name: found for name, found in gap.items() if found}, "rate": rate(run, parts),
            "seconds": stage_seconds(events), "commands": commands(run), "versions": library_versions(),
            "time": judge_time(run, parts).to_dict(), "projection": describe_outcome(**compare_projection(run)),
            "checks": [c for e in events if e["event"] == "stage" for c in e.get("checks", ())],
        }  # fmt: skip
        pictures = {
            name: plots / f"{name}.png"
            for name in ("results", "confidence", "found", "missed", "false_alarms", "lr", "train_batch")
        }
        write_report(
            run.path / "report.html",
            facts,
            {**pictures, "confusion": plots / "confusion_matrix.png"},
            template="detect.html",
        )
        note.text = str(run.path / "report.html")


def write_result(run: Run, parts: DetectParts, checkpoints: Checkpoints, test: dict[str, Any]) -> dict[str, Any]:
    """Write result.json, what `json=true` prints."""
    progress, last, events = parts.state.progress, checkpoints.latest(), run.events
    assert last is not None
    figures = ("n", "num_objects", "low", "high", "look", *SHOWN, *MASKS, "ap50_low", "ap50_high", "mask_low", "mask_high",
               "mask_ap50_low", "mask_ap50_high", "loss", "threshold")  # fmt: skip
    result = {
        "status": "done", "task": parts.plan.task.value, "run": str(run.path), "bundle": str(run.bundle),
        "epochs": len(epochs_of(events)), "steps": progress.step,
        "metrics": {"train": threshold_of(run)["train"], "val": progress.best["metrics"] if progress.best else {},
                    "test": {k: test[k] for k in figures if k in test}},
        "baselines": {name: found["ap50"] for name, found in test["baselines"].items()}, "weights_sha256": tensors_sha256({"": load_file(str(run.bundle / "model.safetensors"))}),
        "state_sha256": tensors_sha256(last.files), "rate": rate(run, parts), "seconds": stage_seconds(events),
        "utilisation": judge_time(run, parts).to_dict(), "projection": compare_projection(run),
        "latency": read_json(run.bundle / "bundle.json")["latency"],
    }  # fmt: skip
    write_json(run.path / "result.json", result)
    return result
