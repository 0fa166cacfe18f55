"""Training speed of other systems on the same pictures: resnet18 from scratch, 128 px, batch 32, two loader processes.

    python benchmarks/peers.py FOLDER NAME...      NAME: bare plain lightning lightning-bf16 trainer fastai ultralytics

Needs an environment of its own with torch, torchvision, lightning, transformers, accelerate, fastai and ultralytics; goodfit
is not needed. FOLDER holds one folder per class. Prints samples per second of the second epoch's training part, and the bare
step in bf16 with channels-last beside it, measured right before: shares of it can be compared between machines.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

SIZE, BATCH, WORKERS = 128, 32, 2


def network(classes: int = 6) -> nn.Module:
    return torchvision.models.resnet18(num_classes=classes)


def pictures(folder: Path) -> torchvision.datasets.ImageFolder:
    from torchvision import transforms as t

    steps = [t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip(), t.ToTensor(),
             t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]  # fmt: skip
    return torchvision.datasets.ImageFolder(str(folder), t.Compose(steps))


def loader(folder: Path) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(pictures(folder), BATCH, shuffle=True, num_workers=WORKERS, drop_last=True,
                                       persistent_workers=True)  # fmt: skip


def bare(_folder: Path | None = None, steps: int = 12) -> float:
    model = network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 6, (BATCH,))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return BATCH / statistics.median(seconds[2:])


def plain(folder: Path) -> float:
    model, data = network(), loader(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        start, count = time.perf_counter(), 0
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            count += len(x)
    return count / (time.perf_counter() - start)


def lightning(folder: Path, precision: str = "32-true") -> float:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

        def on_train_epoch_start(self) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.seconds = time.perf_counter() - self.start

    module, data = Module(), loader(folder)
    with tempfile.TemporaryDirectory() as made:
        pl.Trainer(max_epochs=2, accelerator="cpu", precision=precision, default_root_dir=made, logger=False,
                   enable_checkpointing=False, enable_progress_bar=False).fit(module, data)  # fmt: skip
    return len(data) * BATCH / module.seconds


def trainer(folder: Path) -> float:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def forward(self, pixel_values: Any, labels: Any) -> Any:
            logits = self.model(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    def collate(rows: Any) -> Any:
        return {"pixel_values": torch.stack([r[0] for r in rows]), "labels": torch.tensor([r[1] for r in rows])}

    clock, data = Clock(), pictures(folder)
    with tempfile.TemporaryDirectory() as made:
        arguments = TrainingArguments(made, per_device_train_batch_size=BATCH, num_train_epochs=2, use_cpu=True,
                                      dataloader_num_workers=WORKERS, dataloader_drop_last=True, report_to=[],
                                      save_strategy="no", disable_tqdm=True, remove_unused_columns=False)  # fmt: skip
        Trainer(Wrapped(), arguments, train_dataset=data, data_collator=collate, callbacks=[clock]).train()
    return len(data) // BATCH * BATCH / clock.seconds


def fastai(folder: Path) -> float:
    from fastai.vision.all import Callback, ImageDataLoaders, RandomResizedCrop, resnet18, vision_learner

    class Clock(Callback):
        def before_train(self) -> None:
            self.start = time.perf_counter()

        def after_train(self) -> None:
            self.seconds = time.perf_counter() - self.start

    data = ImageDataLoaders.from_folder(folder, valid_pct=0.02, item_tfms=RandomResizedCrop(SIZE), bs=BATCH,
                                        num_workers=WORKERS, device="cpu")  # fmt: skip
    clock = Clock()
    learner = vision_learner(data, resnet18, pretrained=False, cbs=[clock])
    learner.unfreeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(2)
    return len(data.train) * BATCH / clock.seconds


def ultralytics(folder: Path) -> float:
    import ultralytics as ultralytics_package
    from ultralytics import YOLO

    times: list[float] = []
    with tempfile.TemporaryDirectory() as made:
        root = Path(made) / "data"
        shutil.copytree(folder, root / "train")
        for kind in sorted(p for p in folder.iterdir() if p.is_dir()):
            (root / "val" / kind.name).mkdir(parents=True)
            shutil.copy(sorted(kind.iterdir())[0], root / "val" / kind.name)
        drawing = Path(ultralytics_package.__file__).parent / "cfg/models/11/yolo11-cls-resnet18.yaml"
        own = Path(made) / drawing.name
        own.write_text(drawing.read_text().replace("DEFAULT", "None"))  # from scratch, as the others
        model = YOLO(str(own))
        model.add_callback("on_train_epoch_start", lambda _: times.append(time.perf_counter()))
        model.add_callback("on_train_epoch_end", lambda _: times.append(time.perf_counter()))
        model.train(data=str(root), epochs=2, imgsz=SIZE, batch=BATCH, workers=WORKERS, device="cpu", project=made,
                    plots=False, verbose=False, val=False)  # fmt: skip
        count = sum(1 for _ in (root / "train").rglob("*.jpg"))
    return count / (times[3] - times[2])


RUNS = {"bare": bare, "plain": plain, "lightning": lightning, "lightning-bf16": lambda f: lightning(f, "bf16-mixed"),
        "trainer": trainer, "fastai": fastai, "ultralytics": ultralytics}  # fmt: skip


def main() -> None:
    """Print a line per system, each measured in a process of its own: some leave threads or settings behind."""
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(RUNS)
    if len(names) > 1:
        for name in names:
            done = subprocess.run(
                [sys.executable, __file__, str(folder), name], capture_output=True, text=True, check=False
            )
            print(
                done.stdout.strip().splitlines()[-1] if done.returncode == 0 else f"{name}: {done.stderr[-2000:]}",
                flush=True,
            )
        return
    (name,) = names
    speed = bare()
    found = RUNS[name](folder)
    print(f"{name:<16}{found:6.1f} img/s, bare step {speed:.1f} just before: {100 * found / speed:.0f} %", flush=True)


if __name__ == "__main__":
    main()
