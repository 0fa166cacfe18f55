"""`demo`: 1,797 real handwritten digits, from a folder of PNG files to a tested bundle, in under a minute on two cores."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from goodfit.api.folder import DEFAULT_PROJECT, Run
from goodfit.api.train import train
from goodfit.config.parse import read_request
from goodfit.core.errors import RequestError

EPOCHS = 10


def demo(**asked: Any) -> Run:
    """Write scikit-learn's handwritten digits as class folders and train on them as on any folder.

    The data goes to `digits/` in the project's folder. Any option of `train` may be asked for.

    Raises:
        RequestError: scikit-learn, which carries the digits, is not installed.
    """
    request = read_request(asked)
    if request.data is not None:
        raise RequestError("The demo brings its own data.", where="data=", next=f"goodfit train {request.data}")
    folder = Path(request.project or DEFAULT_PROJECT) / "digits"
    write_digits(folder)
    given = {f.name: getattr(request, f.name) for f in fields(request) if getattr(request, f.name) is not None}
    if request.plan is None:
        given.setdefault("epochs", EPOCHS)
    return train(folder, **given)


def write_digits(folder: Path) -> None:
    """Write the digits (8 x 8 pixels, grey; Alpaydin and Kaynak 1998) as `folder/CLASS/NUMBER.png`, if they are not there."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RequestError("The demo needs scikit-learn, which carries the digits.",
                           next="pip install 'goodfit[demo]'") from error  # fmt: skip
    import numpy as np
    from PIL import Image

    images, targets = load_digits(return_X_y=True)
    for number, (values, target) in enumerate(zip(images, targets, strict=True)):
        path = folder / str(target) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.rint(values.reshape(8, 8) * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(path)
