"""Bundles whose network does not become ONNX: the same predictions by torch, from the bundle's own weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import nn

from goodfit.config.plan import read_plan
from goodfit.core.errors import ExportError
from goodfit.models.detection.build import build_detector, family_of
from goodfit.models.detection.choose import Found
from goodfit.runtime.letterbox import Letterbox
from goodfit.runtime.predictor import Predictor

NUM_FILES, NUM_ODD = 8, 5  # pictures that both networks are asked about: the same code runs twice


class TorchPredictor(Predictor):
    """As `Predictor`, for a bundle that says `"needs": "torch"`: built from its plan.json and model.safetensors."""

    def _open(self, threads: int | None) -> Any:
        self._threads = threads
        plan = read_plan(self.path / "plan.json").changed(pretrained="false")
        network, _ = build_detector(plan, self.labels)
        network.load_state_dict(load_file(str(self.path / "model.safetensors")))
        self._family = family_of(plan)
        return network.eval()

    def _answers(
        self, pixels: npt.NDArray[np.uint8], rows: Sequence[dict[str, Any]], threshold: float
    ) -> Iterator[dict[str, Any]]:
        for one, row in zip(self.find(pixels), rows, strict=True):
            masks = None if one.masks is None else one.masks.numpy()
            objects = self.told(one.boxes.numpy(), one.scores.numpy(), one.classes.numpy(), row, threshold, masks)
            yield {"objects": objects}

    def find(self, pixels: npt.NDArray[np.uint8]) -> list[Found]:
        """The objects of some inputs, uint8 of shape (N, 3, height, width), in pixels of the input."""
        letterbox = self.preprocessing
        assert isinstance(letterbox, Letterbox)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (letterbox.mean, letterbox.std))
        before = torch.get_num_threads()  # of the whole process
        if self._threads is not None and self._threads != before:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                images = (torch.from_numpy(pixels).float() - mean) / std
                return self._family.predict(self._session, {"image": images}, self.selection)[0]
        finally:
            if self._threads is not None and self._threads != before:
                torch.set_num_threads(before)


def no_export(_network: nn.Module, _letterbox: Any, _path: Path) -> nn.Module:
    """There is no model.onnx; what the bundle must reproduce is the network itself, in the memory format of a new one: in another,
    convolutions round otherwise, which moves the edge of a mask in a large picture by a pixel."""
    return _network.cpu().float().to(memory_format=torch.contiguous_format).eval()


def check_torch_bundle(
    predictor: Predictor, reference: nn.Module, files: Sequence[bytes], names: Sequence[str]
) -> dict[str, Any]:
    """The network built anew from the bundle's files finds, from the bytes of images, exactly what the trained one does.

    Raises:
        ExportError: it does not.
    """
    assert isinstance(predictor, TorchPredictor)
    files, names = (
        [*files[:NUM_FILES], *files[NUM_FILES:][-NUM_ODD:]],
        [*names[:NUM_FILES], *names[NUM_FILES:][-NUM_ODD:]],
    )
    built, num = predictor._session, 0
    for number, (data, name) in enumerate(zip(files, names, strict=True)):
        # Of the odd ones, which ask about the pixels, what the network itself says: to draw a hundred masks into the 27 million
        # pixels of the largest takes 10 s.
        answer = _served if number < len(files) - NUM_ODD else _found
        mine = answer(predictor, data)
        predictor._session = reference
        theirs = answer(predictor, data)
        predictor._session = built
        num += len(theirs)
        if mine != theirs:
            raise ExportError(f"The network built from the bundle finds something else than the trained one on {name}.",
                              kept="the trained weights, in checkpoints/best", next="report the model's name")  # fmt: skip
    return {"max_difference": 0.0, "tolerance": 0.0, "num_files": len(files), "num_objects": num}


def _served(predictor: TorchPredictor, data: bytes) -> list[Any]:
    """The objects of a file as they are served."""
    return list(predictor.predict([data], threshold=0.0)[0].get("objects", ()))


def _found(predictor: TorchPredictor, data: bytes) -> list[Any]:
    """The objects of a file as the network gives them, all their numbers, one by one."""
    (found,) = predictor.find(predictor.pixels(data)[None])
    parts = [found.boxes, found.scores, found.classes, *([] if found.masks is None else [found.masks])]
    return [tuple(part.numpy().tobytes() for part in one) for one in zip(*parts, strict=True)]
