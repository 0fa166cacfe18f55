"""One training of another system for benchmarks/accuracy.py; run by it, in the peers' environment.

    python benchmarks/accuracy_systems.py NAME TASK.json EPOCHS SEED OUT

The network is the task's; so are image size and batch. The rest is the system's default, or what its manual writes first:

- torchvision: the loop of torchvision's references/classification. SGD at 0.1 per 256 images, momentum 0.9, weight decay 1e-4,
  cosine by the epoch, label smoothing 0.1, random resized crop and flip; the epoch that validated best is kept.
- trainer: the transformers Trainer with the images, and the keeping of the best epoch, of its image-classification example;
  AdamW at its default of 5e-5, linear decay. `trainer-1e-3` is the same at a rate that suits a convolutional network.
- fastai: the transforms of its book; pretrained `vision_learner(...).fine_tune(EPOCHS)`, which puts its own larger head on the
  network and adds a first epoch of that head alone; from scratch `Learner(...).fit_one_cycle(EPOCHS)`. Keeps the last epoch.
- ultralytics: from scratch only; the network is put into its drawing language. Keeps the best epoch by its own fitness, the
  mean of top-1 and top-5 accuracy.

Writes OUT/predictions.json (test image to class), and prints JSON: `laps`, the seconds from the start of training to the end
of each epoch, validation included, and the versions that ran.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchvision
from accuracy_data import Task
from torch import nn

from goodfit.models.builder import create_at_size

BATCH, WORKERS = 32, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Labels = list[str]  # of the test images, in the task's order


class Laps:
    """Seconds from the start of training to the end of each epoch."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.began = 0.0

    def start(self) -> None:
        self.began = self.began or time.perf_counter()

    def end(self) -> None:
        self.ends.append(time.perf_counter() - self.began)


def network(task: Task) -> nn.Module:
    model = create_at_size(task.model, task.imgsz, num_classes=len(task.classes))
    if task.weights:
        from safetensors.torch import load_file

        own = model.state_dict()
        found = {k: v for k, v in load_file(task.weights).items() if own[k].shape == v.shape}
        missing = set(own) - set(found)
        assert len(missing) == 2, missing  # weight and bias of the head
        model.load_state_dict(found, strict=False)
    return model


class Files(torch.utils.data.Dataset[Any]):
    """Image and class number of each file."""

    def __init__(self, files: list[Path], classes: list[str], transform: Any) -> None:
        self.files, self.classes, self.transform = files, classes, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        file = self.files[number]
        return self.transform(Image.open(file).convert("RGB")), self.classes.index(file.parent.name)


def pictures(task: Task, split: str, resize: int) -> Files:
    """Random crops and flips for training; else the shorter side to `resize` pixels and the centre cut out."""
    from torchvision import transforms as t

    cut = (
        [t.RandomResizedCrop(task.imgsz), t.RandomHorizontalFlip()]
        if split == "train"
        else [t.Resize(resize), t.CenterCrop(task.imgsz)]
    )
    files = task.test_files() if split == "test" else sorted(Path(task.tree, split).glob("*/*"))
    return Files(files, task.classes, t.Compose([*cut, t.ToTensor(), t.Normalize(MEAN, STD)]))


def torchvision_script(task: Task, epochs: int, _seed: int, laps: Laps, _out: Path, _lr: float) -> Labels:
    resize = round(task.imgsz * 256 / 224) if task.weights else task.imgsz  # as its presets; 32 px need no enlarging

    def loader(split: str) -> Any:
        return torch.utils.data.DataLoader(pictures(task, split, resize), BATCH, shuffle=split == "train",
                                           num_workers=WORKERS, persistent_workers=split != "test")  # fmt: skip

    def outputs(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model.eval()
        with torch.inference_mode():
            pairs = [(model(x).argmax(1), y) for x, y in batches]
        return torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs])

    model, train, val = network(task), loader("train"), loader("val")
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * BATCH / 256, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    best, kept = -1.0, {}
    laps.start()
    for _ in range(epochs):
        model.train()
        for x, y in train:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        found, truth = outputs(val)
        accuracy = float((found == truth).double().mean())
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(model.state_dict())
        laps.end()
    model.load_state_dict(kept)
    return [task.classes[k] for k in outputs(loader("test"))[0].tolist()]


def trainer(task: Task, epochs: int, seed: int, laps: Laps, out: Path, lr: float) -> Labels:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network(task)

        def forward(self, pixel_values: Any, labels: Any) -> Any:
            logits = self.model(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            laps.start()

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            laps.end()

    def collate(rows: Any) -> Any:
        return {"pixel_values": torch.stack([r[0] for r in rows]), "labels": torch.tensor([r[1] for r in rows])}

    def accuracy(told: Any) -> dict[str, float]:
        return {"accuracy": float((told.predictions.argmax(1) == told.label_ids).mean())}

    arguments = TrainingArguments(str(out / "trainer"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
                                  num_train_epochs=epochs, seed=seed, dataloader_num_workers=WORKERS, eval_strategy="epoch",
                                  save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="accuracy",
                                  report_to=[], remove_unused_columns=False, **({"learning_rate": lr} if lr else {}))  # fmt: skip
    system = Trainer(Wrapped(), arguments, train_dataset=pictures(task, "train", 0),
                     eval_dataset=pictures(task, "val", task.imgsz), data_collator=collate, compute_metrics=accuracy,
                     callbacks=[Clock()])  # fmt: skip
    system.train()
    logits = system.predict(pictures(task, "test", task.imgsz)).predictions
    return [task.classes[k] for k in logits.argmax(1).tolist()]


def fastai(task: Task, epochs: int, seed: int, laps: Laps, out: Path, _lr: float) -> Labels:
    from fastai.vision.all import (
        Callback,
        ImageDataLoaders,
        Learner,
        Normalize,
        RandomResizedCrop,
        accuracy,
        aug_transforms,
        set_seed,
        vision_learner,
    )

    class Clock(Callback):
        def after_epoch(self) -> None:
            laps.end()

    set_seed(seed)
    normalise = [] if task.weights else [Normalize.from_stats(MEAN, STD)]  # vision_learner adds that of the weights
    data = ImageDataLoaders.from_folder(task.tree, train="train", valid="val", bs=BATCH, num_workers=WORKERS,
                                        item_tfms=RandomResizedCrop(task.imgsz, min_scale=0.5),
                                        batch_tfms=[*aug_transforms(), *normalise])  # fmt: skip
    assert list(data.vocab) == task.classes
    if task.weights:
        learner = vision_learner(data, task.model, metrics=accuracy, cbs=[Clock()], path=out,
                                 pretrained_cfg_overlay={"file": task.weights})  # fmt: skip
        laps.start()
        learner.fine_tune(epochs)
    else:
        learner = Learner(data, network(task), metrics=accuracy, cbs=[Clock()], path=out)
        laps.start()
        learner.fit_one_cycle(epochs)
    found, _ = learner.get_preds(dl=data.test_dl(task.test_files()), cbs=[])
    return [task.classes[k] for k in found.argmax(1).tolist()]


class Drawn(nn.Module):
    """The task's network as a layer of Ultralytics' drawings: like its own head, class probabilities and logits once it
    does not train."""

    task: Task

    def __init__(self, _classes: int) -> None:
        super().__init__()
        self.network = network(self.task)

    def forward(self, x: Any) -> Any:
        logits = self.network(x)
        return logits if self.training else (logits.softmax(1), logits)


def ultralytics(task: Task, epochs: int, seed: int, laps: Laps, out: Path, _lr: float) -> Labels:
    from ultralytics import YOLO
    from ultralytics.nn import tasks

    assert not task.weights, "from scratch only"
    Drawn.task, tasks.Drawn = task, Drawn
    drawing, folder = out / "drawn-cls.yaml", out / "data"
    drawing.write_text("nc: 1000\nbackbone: []\nhead:\n  - [-1, 1, Drawn, [nc]]\n")
    folder.mkdir()
    for split in ("train", "val"):  # it writes its own list of files beside these
        (folder / split).symlink_to(Path(task.tree, split))
    model = YOLO(str(drawing), task="classify")
    model.add_callback(
        "on_train_start", lambda _: torch.set_num_threads(os.cpu_count() or 1)
    )  # it leaves one of two idle
    model.add_callback("on_train_start", lambda _: laps.start())
    model.add_callback("on_fit_epoch_end", lambda _: laps.end())
    model.train(data=str(folder), epochs=epochs, imgsz=task.imgsz, batch=BATCH, seed=seed, project=str(out))
    del laps.ends[epochs:]  # it validates once more at the end
    found = {Path(r.path): r.names[r.probs.top1]
             for r in model.predict(f"{task.tree}/test/*/*", imgsz=task.imgsz, stream=True, verbose=False)}  # fmt: skip
    return [found[file] for file in task.test_files()]


SYSTEMS: dict[str, tuple[Callable[[Task, int, int, Laps, Path, float], Labels], float]] = {
    "torchvision": (torchvision_script, 0.0), "trainer": (trainer, 0.0), "trainer-1e-3": (trainer, 1e-3),
    "fastai": (fastai, 0.0), "ultralytics": (ultralytics, 0.0),
}  # fmt: skip


def main() -> None:
    """Run one system, and print what it took."""
    name, task, epochs, seed, out = sys.argv[1], Task(**json.loads(Path(sys.argv[2]).read_text("utf-8"))), *sys.argv[3:]
    torch.manual_seed(int(seed))
    torchvision.disable_beta_transforms_warning()
    system, lr = SYSTEMS[name]
    laps = Laps()
    labels = system(task, int(epochs), int(seed), laps, Path(out), lr)
    names = [str(file.relative_to(task.tree)) for file in task.test_files()]
    (Path(out) / "predictions.json").write_text(json.dumps(dict(zip(names, labels, strict=True))), "utf-8")
    versions = {p: metadata.version(p) for p in ("torch", "timm", "transformers", "fastai", "ultralytics")}
    print("\n" + json.dumps({"laps": laps.ends, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
