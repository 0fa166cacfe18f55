"""What only a GPU can show. Skipped without one; every promise has a CPU test of its own."""

from __future__ import annotations

import pytest
import torch

import goodfit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu_learns_and_repeats(make_images, tmp_path, precision):
    images = make_images(60)
    asked = {"epochs": 5, "batch": 16, "precision": precision, "device": "cuda", "deterministic": True}
    first, second = (goodfit.train(images, project=str(tmp_path), **asked) for _ in range(2))
    assert first.metrics["test"]["accuracy"] > 0.9
    assert first.result["state_sha256"] == second.result["state_sha256"]
