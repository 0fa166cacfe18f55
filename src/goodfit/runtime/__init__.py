"""Run a bundle with numpy, Pillow and onnxruntime alone: no torch is imported here.

Example:
    >>> from goodfit.runtime import Predictor
    >>> Predictor("runs/bottles-1/bundle").predict(["photo.jpg"])[0]["label"]  # doctest: +SKIP
    'cap'

The same preprocessing serves validation, the final test and the bundle, so there is one description and one code path.
"""

from goodfit.runtime.images import ImageError, Preprocessing, decode_image
from goodfit.runtime.predictor import Predictor

__all__ = ["ImageError", "Predictor", "Preprocessing", "decode_image"]
