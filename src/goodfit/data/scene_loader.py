"""Batches of pictures with objects: augmented for training, through the serving path for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.config.sizes import InputSizes
from goodfit.data.copy_paste import Drawn, chosen, partner_of, paste_objects, what_is_left
from goodfit.data.index import DatasetIndex
from goodfit.data.loader import MicroBatch, each_on_threads, own_threads, row_of
from goodfit.data.objects import MaskBook, objects_of, padded
from goodfit.data.scenes import Paste, ScenePreset, compose, cut_boxes, draw_scene
from goodfit.data.store import PictureStore, as_audited
from goodfit.runtime.letterbox import Letterbox, Place
from goodfit.runtime.masks import CutMask

COPIES = 1 << 60  # added to a sample's number for the picture that lies upon it: another place, zoom and mirror
Collate = Callable[[npt.NDArray[np.uint8], dict[str, Any]], Any]  # images (N, 3, H, W), targets


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneSamples:
    """Makes augmented samples of any epoch, without state of its own; as `TrainSamples` for pictures of one class.

    Attributes:
        rows: Pictures that a mosaic, or a copy of objects, may take in.
        letterbox: The input as it is served.
        sizes: The longer side of each batch's input.
        masks: Those of the objects, where they are learned too.
    """

    index: DatasetIndex
    store: PictureStore
    rows: npt.NDArray[np.int64]
    preset: ScenePreset
    letterbox: Letterbox
    flip: float
    seed: int
    collate: Collate
    sizes: InputSizes
    masks: MaskBook | None = None

    def size_of(self, epoch: int, number: int, *, closing: bool = False) -> int:
        """The longer side of the input of an epoch's batch of this number, pixels: a function of these and the seed."""
        return self.sizes.draw(seed=self.seed, epoch=epoch, number=number, closing=closing)

    def shape_at(self, size: int | None) -> tuple[int, int]:
        """Height and width of the input whose longer side is `size`; None is that which is served."""
        if size is None or size == self.sizes.imgsz:
            return self.letterbox.shape
        return self.letterbox.at(size, self.sizes.step).shape

    def micro_batch(
        self, epoch: int, samples: npt.NDArray[np.int64], *, size: int | None = None, closing: bool = False,
        threads: int = 1,
    ) -> MicroBatch:  # fmt: skip
        """The collated, augmented samples of an epoch; with its mild form while `closing`, at the end of a run."""
        preset = self.preset.closing() if closing else self.preset
        shape, kept = self.shape_at(size), self.store.kept_sizes
        scenes = [
            compose(preset, seed=self.seed, epoch=epoch, sample=int(sample), row=int(row), rows=self.rows, sizes=kept,
                    shape=shape, flip=self.flip)
            for sample, row in zip(samples, row_of(samples), strict=True)
        ]  # fmt: skip
        made = np.empty((len(samples), *shape, 3), np.uint8)
        with own_threads():
            each_on_threads(len(samples), threads, lambda k: self._draw(scenes[k], made[k]))
        drawn = [self._drawn(pastes, shape) for pastes in scenes]
        if self.masks is not None and preset.copy_paste:
            drawn = [
                self._with_copies(preset, epoch, int(sample), made[k], drawn[k]) for k, sample in enumerate(samples)
            ]
        targets: dict[str, Any] = {"boxes": padded([d.boxes for d in drawn], 0.0, np.float32, width=(4,)),
                   "classes": padded([d.classes for d in drawn], -1, np.int64)}  # fmt: skip
        if self.masks is not None:
            targets["masks"] = [
                d.masks for d in drawn
            ]  # not padded: one crowded picture must not cost its masks times the batch
        return MicroBatch(samples, self.collate(made.transpose(0, 3, 1, 2), targets))

    def _draw(self, pastes: list[Paste], out: npt.NDArray[np.uint8]) -> None:
        draw_scene(pastes, [self.store.get(p.row) for p in pastes], out)

    def _drawn(self, pastes: list[Paste], shape: tuple[int, int]) -> Drawn:
        parts = [self._objects(paste, shape) for paste in pastes]
        return Drawn(np.concatenate([np.zeros((0, 4)), *(b for b, _, _ in parts)]),
                     np.concatenate([np.zeros(0, np.int64), *(c for _, c, _ in parts)]),
                     np.concatenate([np.zeros((0, *shape), np.uint8), *(m for _, _, m in parts)]))  # fmt: skip

    def _with_copies(
        self, preset: ScenePreset, epoch: int, sample: int, pixels: npt.NDArray[np.uint8], under: Drawn
    ) -> Drawn:
        """A drawn sample with some objects of another picture upon it, if it gets some."""
        partner = partner_of(preset.copy_paste, seed=self.seed, epoch=epoch, sample=sample, rows=self.rows)
        if partner is None:
            return under
        shape = (pixels.shape[0], pixels.shape[1])
        pastes = compose(replace(preset, mosaic=0.0), seed=self.seed, epoch=epoch, sample=COPIES + sample, row=partner, rows=self.rows,
                         sizes=self.store.kept_sizes, shape=shape, flip=self.flip)  # fmt: skip
        other = np.empty_like(pixels)
        self._draw(pastes, other)
        there = self._drawn(pastes, shape)
        taken = chosen(len(there.boxes), seed=self.seed, epoch=epoch, sample=sample) & there.masks.any(axis=(1, 2))
        return paste_objects(pixels, under, other, Drawn(there.boxes[taken], there.classes[taken], there.masks[taken]))

    def _objects(
        self, paste: Paste, shape: tuple[int, int]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        found = objects_of(self.index, paste.row)
        assert self.index.sizes is not None
        shares = self.store.kept_sizes[paste.row] / self.index.sizes[paste.row]
        whole = paste.boxes(found.boxes, shares)
        boxes, seen = cut_boxes(whole, paste.target)
        seen &= ~found.crowd
        if self.masks is None:
            return boxes[seen], found.classes[seen], np.zeros((0, *shape), np.uint8)
        numbers, share = np.flatnonzero(seen), float(paste.scale(shares).prod())
        masks = np.zeros((len(numbers), *shape), np.uint8)
        for out, number in zip(masks, numbers, strict=True):
            mask = self.masks.get(paste.row, int(found.numbers[number]))
            paste.mask(mask, shares, out)
            # Of a box that was cut, a corner may be left with no pixel of the object in it.
            if (boxes[number] != whole[number]).any():
                boxes[number], seen[number] = what_is_left(out, mask.area * share)
        return boxes[seen], found.classes[seen], masks if seen[numbers].all() else masks[seen[numbers]]


class SceneReader:
    """Micro-batches of a split through the serving path, each sample once, sliced by process without padding.

    Args:
        keep: Keep the serving path's output (uint8, three bytes a pixel) for the next pass.
        masks: Those of the objects, where they are judged too.
    """

    def __init__(
        self, index: DatasetIndex, rows: npt.NDArray[np.int64], *, letterbox: Letterbox, batch: int, threads: int,
        collate: Collate, keep: bool, rank: int = 0, size: int = 1, masks: MaskBook | None = None,
    ) -> None:  # fmt: skip
        self._index = index
        self._masks = masks
        self.rows = rows[rank::size]
        self._letterbox = letterbox
        self._batch = batch
        self._threads = threads
        self._collate = collate
        self._kept: dict[int, npt.NDArray[np.uint8]] | None = {} if keep else None

    @property
    def bytes_to_keep(self) -> int:
        """Of pictures that will be kept and are not yet."""
        if self._kept is None:
            return 0
        return (len(self.rows) - len(self._kept)) * 3 * self._letterbox.width * self._letterbox.height

    def halve(self) -> bool:
        """Half as many samples at once from now on. False if there is one at a time already."""
        if self._batch <= 1:
            return False
        self._batch //= 2
        return True

    def __iter__(self) -> Iterator[MicroBatch]:
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(self.rows), self._batch):
                rows = self.rows[start : start + self._batch]
                pixels = np.stack(list(pool.map(self._pixels, rows.tolist())))
                yield MicroBatch(rows, self._collate(pixels, self._targets(rows)))

    def _pixels(self, row: int) -> npt.NDArray[np.uint8]:
        if self._kept is not None and row in self._kept:
            return self._kept[row]
        with as_audited():
            pixels, _ = self._letterbox.read(self._index.file(row))
        if self._kept is not None:
            self._kept[row] = pixels
        return pixels

    def _targets(self, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        assert self._index.sizes is not None
        sizes = self._index.sizes[rows]
        found = [objects_of(self._index, int(row)) for row in rows]
        places = [self._letterbox.place((int(w), int(h))) for w, h in sizes]
        learned = [(p.boxes_in(o.boxes[~o.crowd]), o.classes[~o.crowd]) for p, o in zip(places, found, strict=True)]
        made = {
            "boxes": padded([b for b, _ in learned], 0.0, np.float32, width=(4,)),
            "classes": padded([c for _, c in learned], -1, np.int64),
            "true_boxes": padded([o.boxes for o in found], 0.0, np.float64, width=(4,)),
            "true_classes": padded([o.classes for o in found], -1, np.int64),
            "crowd": padded([o.crowd for o in found], False, np.bool_),
            "areas": padded([o.areas for o in found], np.nan, np.float64),
            "place": np.array([(p.scale_x, p.scale_y, p.left, p.top) for p in places], np.float64).reshape(-1, 4),
            "size": sizes.astype(np.float64),
        }
        if self._masks is None:
            return made
        cut = [[self._masks.get(int(r), int(n)) for n in o.numbers] for r, o in zip(rows, found, strict=True)]
        inputs = [
            self._in_input(masks, o.crowd, p, (int(w), int(h)))
            for masks, o, p, (w, h) in zip(cut, found, places, sizes, strict=True)
        ]
        return {**made, "masks": inputs, "true_masks": cut}

    def _in_input(
        self, masks: list[CutMask], crowd: npt.NDArray[np.bool_], place: Place, size: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        """The masks of what is learned as they lie in the input. Shape: (objects that are no crowds, H, W)."""
        shown = Paste(
            0,
            (0, 0, *size),
            (place.left, place.top, place.left + place.width, place.top + place.height),
            mirrored=False,
        )
        made = np.zeros((int((~crowd).sum()), *self._letterbox.shape), np.uint8)
        for out, number in zip(made, np.flatnonzero(~crowd), strict=True):
            shown.mask(masks[number], np.ones(2), out)
        return made
