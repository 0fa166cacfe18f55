"""`demo`: real handwritten digits, from files to a tested bundle: one digit a picture, or scenes of several with boxes or masks."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.api.folder import DEFAULT_PROJECT, Run
from goodfit.api.train import train
from goodfit.config.parse import read_request
from goodfit.core.errors import RequestError
from goodfit.core.random import derive_seed, stream

# About two minutes each on two cores. In so few epochs Mask R-CNN learns more at three times its usual rate: AP50 of masks 0.92 after four.
RECIPES: dict[str, dict[str, Any]] = {
    "classify": {"epochs": 10},
    "detect": {"epochs": 11},
    "segment": {"epochs": 5, "lr": 7e-4},
}
SCENES, SCENE_SIDE = 400, 128
ZOOM = (3, 4)  # times the 8 pixels of a digit
LEAST_DIGITS, MOST_DIGITS = 5, 10  # of a scene: the cost of a step hardly depends on them, what it teaches does
TRIES = 8  # to find room for a digit
INK = 0.35  # of full ink, from which a pixel belongs to its digit
_SCENE = stream("demo scene")
Digits = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


def demo(kind: str = "classify", **asked: Any) -> Run:
    """Train on scikit-learn's handwritten digits as on any folder.

    The data goes to `digits/`, `digit_boxes/` or `digit_masks/` in the project's folder. Any option of `train` may be asked for.

    Args:
        kind: "classify": a folder per digit. "detect" and "segment": scenes of several digits on a noisy ground, with boxes or masks
            in COCO's form.

    Raises:
        RequestError: scikit-learn, which carries the digits, is not installed, or there is no such demo.
    """
    if kind not in RECIPES:
        raise RequestError(
            f"There is no demo called {kind}.", next=f"goodfit demo, or goodfit demo {' or '.join(list(RECIPES)[1:])}"
        )
    request = read_request(asked)
    if request.data is not None:
        raise RequestError("The demo brings its own data.", where="data=", next=f"goodfit train {request.data}")
    project = Path(request.project or DEFAULT_PROJECT)
    if kind == "classify":
        folder = project / "digits"
        write_digits(folder)
    else:
        folder = project / ("digit_boxes" if kind == "detect" else "digit_masks")
        write_scenes(folder, masks=kind == "segment")
    given = {f.name: getattr(request, f.name) for f in fields(request) if getattr(request, f.name) is not None}
    if request.plan is None:
        given = {**RECIPES[kind], **given}
    return train(folder, **given)


def _digits() -> Digits:
    """Grey values from 0 to 1, shape (1,797, 8, 8), and what they are (Alpaydin and Kaynak 1998)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RequestError("The demo needs scikit-learn, which carries the digits.",
                           next="pip install 'goodfit[demo]'") from error  # fmt: skip
    images, targets = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8) / 16, targets.astype(np.int64)


def write_digits(folder: Path) -> None:
    """Write the digits (8 x 8 pixels, grey) as `folder/CLASS/NUMBER.png`, if they are not there."""
    from PIL import Image

    for number, (values, target) in enumerate(zip(*_digits(), strict=True)):
        path = folder / str(target) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(values * 255).astype(np.uint8)).save(path)


def write_scenes(folder: Path, *, masks: bool, num: int = SCENES) -> None:
    """Write scenes of 128 × 128 pixels with five to ten digits each, as far as there is room, and `annotations.json` in COCO's form, if it is not there.

    Args:
        masks: With the digits' pixels as run lengths, beside their boxes.
    """
    from PIL import Image

    if (folder / "annotations.json").is_file():
        return
    digits = _digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(num):
        pixels, found = _scene(digits, number)
        name = f"{number:04d}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number + 1, "file_name": name, "width": SCENE_SIDE, "height": SCENE_SIDE})
        for kind, mask in found:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
            made = {
                "id": len(annotations) + 1,
                "image_id": number + 1,
                "category_id": kind + 1,
                "bbox": box,
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
            annotations.append(made | ({"segmentation": _run_lengths(mask)} if masks else {}))
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (folder / "annotations.json").write_text(text, "utf-8")  # last: with it the folder is whole


def _scene(digits: Digits, number: int) -> tuple[npt.NDArray[np.uint8], list[tuple[int, npt.NDArray[np.bool_]]]]:
    """The pixels of a scene, and each digit in it with its mask; digits do not touch."""
    from PIL import Image

    draw = np.random.default_rng(derive_seed(_SCENE, number))
    ground = 40 + 60 * draw.random()
    made = np.clip(draw.normal(ground, 12, (SCENE_SIDE, SCENE_SIDE)), 0, 255)
    taken, found = np.zeros((SCENE_SIDE, SCENE_SIDE), bool), []
    for _ in range(int(draw.integers(LEAST_DIGITS, MOST_DIGITS + 1))):
        which, side = int(draw.integers(len(digits[0]))), 8 * int(draw.integers(ZOOM[0], ZOOM[1] + 1))
        ink = (
            np.asarray(
                Image.fromarray((255 * digits[0][which]).astype(np.uint8)).resize(
                    (side, side), Image.Resampling.BICUBIC
                )
            )
            / 255
        )
        spots = draw.integers(0, SCENE_SIDE - side, (TRIES, 2)).tolist()
        places = [(slice(top, top + side), slice(left, left + side)) for left, top in spots]
        if (place := next((p for p in places if not taken[p].any()), None)) is None:
            continue
        taken[place] = True
        made[place] += ink * (255 - ground) * (0.6 + 0.4 * draw.random())
        mask = np.zeros_like(taken)
        mask[place] = ink >= INK
        found.append((int(digits[1][which]), mask))
    grey = np.clip(np.rint(made), 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2), found


def _run_lengths(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run lengths: column by column, background first."""
    flat = mask.ravel(order="F")
    edges = np.concatenate([[0], np.flatnonzero(np.diff(flat.view(np.int8))) + 1, [len(flat)]])
    runs = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}
