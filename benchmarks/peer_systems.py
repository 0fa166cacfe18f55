"""One training of three epochs in another system, with its defaults; run by benchmarks/peers.py, in the peers' environment.

    python benchmarks/peer_systems.py NAME FOLDER OUT      FOLDER holds train/, val/ and test/ with one folder per class

resnet18 from scratch, 128 px, batch 32, random crops and flips. What a person must write for a system is written the
shortest way its manual shows; everything else is left at its default: precision, memory format, optimizer where it chooses
one, checkpoints, loggers, validation after each epoch. Names that end in "-half" add bf16 and channels-last by the
system's own options. Prints JSON: images and seconds of each epoch's training part, and when the last epoch ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

SIZE, BATCH, WORKERS, EPOCHS, CLASSES = 128, 32, 2, 3, 6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Laps:
    """Images and seconds of each epoch's training part."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, float]] = []
        self.began = 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def end(self, images: int) -> None:
        self.epochs.append((images, time.perf_counter() - self.began))


def network() -> nn.Module:
    return torchvision.models.resnet18(num_classes=CLASSES)


def pictures(folder: Path, split: str) -> torchvision.datasets.ImageFolder:
    from torchvision import transforms as t

    cut = (
        [t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip()]
        if split == "train"
        else [t.Resize(SIZE), t.CenterCrop(SIZE)]
    )
    return torchvision.datasets.ImageFolder(
        str(folder / split), t.Compose([*cut, t.ToTensor(), t.Normalize(MEAN, STD)])
    )


def loader(folder: Path, split: str) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(pictures(folder, split), BATCH, shuffle=split == "train", num_workers=WORKERS,
                                       drop_last=split == "train", persistent_workers=True)  # fmt: skip


def plain(laps: Laps, folder: Path, _out: Path, half: bool) -> None:
    layout = torch.channels_last if half else torch.contiguous_format
    model, train, val = network().to(memory_format=layout), loader(folder, "train"), loader(folder, "val")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(EPOCHS):
        laps.start()
        model.train()
        count = 0
        for x, y in train:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(model(x.to(memory_format=layout)), y)
            loss.backward()
            optimizer.step()
            count += len(x)
        laps.end(count)
        model.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            sum(int((model(x).argmax(1) == y).sum()) for x, y in val)


def lightning(laps: Laps, folder: Path, out: Path, half: bool) -> None:
    import lightning as pl

    train, val = loader(folder, "train"), loader(folder, "val")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network().to(memory_format=torch.channels_last) if half else network()

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            laps.start()
            self.waited = 0.0

        def on_validation_start(self, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_validation_end(self, *_: Any) -> None:
            self.waited = time.perf_counter() - self.began

        def on_train_epoch_end(self, *_: Any) -> None:  # after the validation, which is not the training part
            laps.end(len(train) * BATCH)
            images, seconds = laps.epochs.pop()
            laps.epochs.append((images, seconds - self.waited))

    pl.Trainer(max_epochs=EPOCHS, precision="bf16-mixed" if half else None, default_root_dir=out,
               callbacks=[Clock()]).fit(Module(), train, val)  # fmt: skip


def trainer(laps: Laps, folder: Path, out: Path, half: bool) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network().to(memory_format=torch.channels_last) if half else network()

        def forward(self, pixel_values: Any, labels: Any) -> Any:
            logits = self.model(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    train, val = pictures(folder, "train"), pictures(folder, "val")

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            laps.start()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            laps.end(len(train))

    def collate(rows: Any) -> Any:
        return {"pixel_values": torch.stack([r[0] for r in rows]), "labels": torch.tensor([r[1] for r in rows])}

    arguments = TrainingArguments(str(out), per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS, bf16=half,
                                  use_cpu=half and not torch.cuda.is_available(),  # else it refuses bf16
                                  save_strategy="no" if half else "steps",  # its default; channels-last weights it cannot save
                                  dataloader_num_workers=WORKERS, eval_strategy="epoch", report_to=[],
                                  remove_unused_columns=False)  # fmt: skip
    Trainer(
        Wrapped(), arguments, train_dataset=train, eval_dataset=val, data_collator=collate, callbacks=[Clock()]
    ).train()


def fastai(laps: Laps, folder: Path, out: Path, _half: bool) -> None:
    from fastai.vision.all import Callback, ImageDataLoaders, RandomResizedCrop, accuracy, resnet18, vision_learner

    class Clock(Callback):
        def before_train(self) -> None:
            laps.start()

        def after_train(self) -> None:
            laps.end(len(data.train) * BATCH)

    data = ImageDataLoaders.from_folder(folder, train="train", valid="val", item_tfms=RandomResizedCrop(SIZE), bs=BATCH,
                                        num_workers=WORKERS)  # fmt: skip
    learner = vision_learner(data, resnet18, pretrained=False, metrics=accuracy, cbs=[Clock()], path=out)
    learner.unfreeze()
    learner.fit(EPOCHS)


def ultralytics(laps: Laps, folder: Path, out: Path, _half: bool) -> None:
    import ultralytics as package
    from ultralytics import YOLO

    drawing = Path(package.__file__).parent / "cfg/models/11/yolo11-cls-resnet18.yaml"
    own = out / drawing.name
    own.write_text(drawing.read_text().replace("DEFAULT", "None"))  # from scratch, as the others
    count = sum(1 for p in (folder / "train").rglob("*") if p.is_file())
    model = YOLO(str(own))
    model.add_callback(
        "on_train_start", lambda _: torch.set_num_threads(os.cpu_count() or 1)
    )  # it leaves one of two idle
    model.add_callback("on_train_epoch_start", lambda _: laps.start())
    model.add_callback("on_train_epoch_end", lambda _: laps.end(count))
    model.train(data=str(folder), epochs=EPOCHS, imgsz=SIZE, batch=BATCH, project=str(out))


SYSTEMS: dict[str, Callable[[Laps, Path, Path, bool], None]] = {
    "plain": plain, "lightning": lightning, "trainer": trainer, "fastai": fastai, "ultralytics": ultralytics
}  # fmt: skip


def main() -> None:
    """Run one system and print what it took."""
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    laps = Laps()
    SYSTEMS[name.removesuffix("-half")](laps, folder, out, name.endswith("-half"))
    print("\n" + json.dumps({"epochs": laps.epochs, "at": time.time()}), flush=True)


if __name__ == "__main__":
    main()
