"""What only a GPU can show. Skipped without one; every promise has a CPU test of its own."""

from __future__ import annotations

import time

import pytest
import torch

import goodfit
from goodfit.engine.device import HostCopy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_run_on_the_gpu_learns_and_repeats(make_images, tmp_path, precision):
    images = make_images(60)
    asked = {"epochs": 5, "batch": 16, "precision": precision, "device": "cuda", "deterministic": True}
    first, second = (goodfit.train(images, project=str(tmp_path), **asked) for _ in range(2))
    assert first.metrics["test"]["accuracy"] > 0.9
    assert first.result["state_sha256"] == second.result["state_sha256"]


def test_reading_a_record_does_not_wait_for_the_next_step():
    value = torch.tensor(3.0, device="cuda")
    copied = HostCopy([value, value > 2])
    torch.cuda._sleep(2_000_000_000)  # about a second of work that was queued after
    start = time.perf_counter()
    assert copied.read() == [3.0, 1.0]
    read = time.perf_counter() - start
    torch.cuda.synchronize()
    assert read < 0.2 * (time.perf_counter() - start)


def test_tf32_rounds_both_passes_and_fp32_neither_when_they_take_turns():
    from goodfit.engine.device import DevicePolicy, tf32_kept

    def gaps(precision):
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(512, 512, bias=False).cuda(), torch.randn(256, 512, device="cuda")
        with DevicePolicy(kind="cuda", precision=precision, channels_last=False).autocast():
            y = layer(x)
        y.square().sum().backward()
        exact = x.double() @ layer.weight.double().T
        gradient = 2 * exact.T @ x.double()
        return float((y - exact).norm() / exact.norm()), float((layer.weight.grad - gradient).norm() / gradient.norm())

    with tf32_kept():
        for precision in ("fp32", "tf32", "fp32", "tf32"):
            assert all((gap > 5e-5) == (precision == "tf32") for gap in gaps(precision)), precision


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_on_the_gpu_learns(make_images, tmp_path, mode):
    run = goodfit.train(make_images(60), project=str(tmp_path), epochs=5, batch=16, device="cuda", compile=mode)
    assert run.metrics["test"]["accuracy"] > 0.9
