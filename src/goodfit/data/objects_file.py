"""`objects.safetensors` of a run's folder: boxes and masks of every sample, so that a run can be resumed without its annotations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from goodfit.core.errors import DataError
from goodfit.data.columns import Blobs, Objects, Strings
from goodfit.data.index import DatasetIndex

PLAIN = ("starts", "boxes", "classes", "crowd", "kept", "mask_kinds", "numbers")


def write_objects(index: DatasetIndex) -> bytes:
    """The objects of an index, with its class names and task, as the bytes of a safetensors file."""
    objects = index.objects
    assert objects is not None
    masks, ends = objects.masks.parts
    tensors = {name: np.ascontiguousarray(getattr(objects, name)) for name in PLAIN}
    tensors |= {"masks": np.frombuffer(masks, np.uint8), "mask_ends": ends}
    if objects.areas is not None:
        tensors["areas"] = objects.areas
    told = {"task": index.task, "class_names": list(index.class_names), "relative": objects.relative}
    return save(tensors, metadata={"goodfit": json.dumps(told)})


def with_objects(index: DatasetIndex, path: Path) -> DatasetIndex:
    """An index as `read_split` reads it, with the objects that write_objects wrote beside it.

    Raises:
        DataError: the file is missing or damaged, or belongs to another split.
    """
    try:
        tensors = load_file(str(path))
        with safe_open(str(path), framework="np") as handle:
            told = json.loads(handle.metadata()["goodfit"])
        masks = Blobs.of(tensors["masks"].tobytes(), tensors["mask_ends"])
        objects = Objects(**{name: tensors[name] for name in PLAIN}, masks=masks, files=Strings([""] * len(index)),
                          areas=tensors.get("areas"), relative=bool(told["relative"]))  # fmt: skip
        if len(objects.starts) != len(index) + 1:
            raise ValueError(f"it has {len(objects.starts) - 1} samples, not {len(index)}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"The run's record of objects cannot be read: {error}.", where=str(path),
                        next="start the run anew from its data") from error  # fmt: skip
    names = tuple(str(name) for name in told["class_names"])
    return replace(index, task=str(told["task"]), class_names=names, objects=objects)
