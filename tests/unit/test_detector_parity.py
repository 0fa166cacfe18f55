"""What the proof of a detector's export lets pass and what not, on candidates that are written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from goodfit.core.errors import ExportError
from goodfit.outcome.detector_export import Unsteady, check_detector_parity
from goodfit.runtime.detections import Selection, select_objects

BOXES = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], np.float32)


class Served:
    """Stands for a bundle's predictor that gives the same candidates for every picture."""

    batch = 2

    def __init__(self, scores, *, boxes=BOXES, most=2):
        self.selection = Selection(most=most)
        self._given = boxes, np.array(scores, np.float32)[:, None]

    def pixels(self, _data, *, where=""):
        return np.zeros((3, 4, 4), np.uint8)

    def run(self, pixels):
        return [np.repeat(v[None], len(pixels), axis=0) for v in self._given]

    def objects(self, boxes, scores):
        return select_objects(boxes, scores, self.selection)


class Trained:
    """Stands for the trained network."""

    lowest = None

    def __init__(self, scores, *, boxes=BOXES, steady=True):
        self._given = torch.from_numpy(boxes), torch.tensor(scores)[:, None]
        self._steady = steady

    def is_steady(self, _pixels):
        return self._steady

    def __call__(self, pixels):
        return tuple(v[None].repeat(len(pixels), 1, 1) for v in self._given)


def check(served, trained):
    return check_detector_parity(served, trained, [b"", b"", b""], ["a", "b", "c"])


def test_equal_candidates_are_equal():
    found = check(Served([0.5, 0.3, 0.2]), Trained([0.5, 0.3, 0.2]))
    assert (
        found["num_files"],
        found["num_left_out"] + found["num_ties"],
        found["num_objects"],
        found["max_difference"],
    ) == (3, 0, 6, 0.0)


def test_which_of_two_that_tie_comes_last_is_no_difference():
    """Two objects are reported, and the second place is a draw to seven digits."""
    found = check(Served([0.5, 0.3, 0.3 + 1e-7]), Trained([0.5, 0.3 + 1e-7, 0.3]))
    assert (found["num_files"], found["num_ties"]) == (3, 3) and 0 < found["max_difference"] < 1e-6


@pytest.mark.parametrize(
    ("served", "trained"),
    [
        (Served([0.5, 0.3, 0.3 + 4e-4]), Trained([0.5, 0.3 + 4e-4, 0.3])),  # no draw, though within the tolerance
        (Served([0.5, 0.3, 0.2]), Trained([0.5, 0.3, 0.21])),
        (Served([0.5, 0.3, 0.2], boxes=BOXES + 1), Trained([0.5, 0.3, 0.2])),
        (Served([0.5, 0.3, 0.0]), Trained([0.5, 0.3, 0.3])),
    ],
    ids=["order", "score", "place", "missing"],
)
def test_another_answer_is_refused(served, trained):
    with pytest.raises(ExportError, match="does not reproduce"):
        check(served, trained)


def test_candidates_that_hang_on_a_rounding_are_told():
    with pytest.raises(Unsteady, match="changes with a rounding on 3 of 3"):
        check(Served([0.5, 0.3, 0.2]), Trained([0.5, 0.3, 0.2], steady=False))
