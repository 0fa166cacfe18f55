"""The switch for tf32, and compiling in place: found by name where it cannot work, and exact otherwise."""

import copy

import pytest
import torch
from torch import nn

from goodfit.core.errors import RequestError, TrainingError
from goodfit.engine import device
from goodfit.engine.device import DevicePolicy, compile_in_place, compiler_problem, eagerly, tf32_kept
from plans import plan_of


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_tf32_is_switched_at_every_forward_pass_and_put_back():
    def seen():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = seen()
    with tf32_kept():
        for precision in ("tf32", "fp32", "tf32", "bf16"):
            DevicePolicy(kind="cuda", precision=precision, channels_last=False).autocast()
            assert seen() == (precision == "tf32",) * 2
        DevicePolicy(kind="cuda", precision="tf32", channels_last=False).autocast()
        DevicePolicy(kind="cpu", precision="fp32", channels_last=False).autocast()
        assert seen() == (True, True)  # a CPU's forward pass leaves it alone
    assert seen() == before


def test_compiling_without_a_compiler_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RequestError, match=r"compile=default: no C\+\+ compiler"):
        compile_in_place(torch.nn.Linear(2, 2), "default")
    compile_in_place(torch.nn.Linear(2, 2), "off")


def test_a_compiler_that_fails_is_named():
    from torch._dynamo.exc import TorchDynamoException

    from goodfit.api.assemble import execution

    with pytest.raises(TrainingError, match="could not compile"), execution(plan_of(compile="default", threads=2)):
        raise TorchDynamoException("g++ found no header")
    with pytest.raises(RuntimeError, match="another"), execution(plan_of(threads=2)):
        raise RuntimeError("another")


@pytest.mark.skipif(bool(compiler_problem()), reason="needs a C++ compiler")
def test_a_compiled_network_keeps_its_names_its_dropout_and_its_result():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    compiled = copy.deepcopy(plain)
    compile_in_place(compiled, "default")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert copy.deepcopy(compiled)._compiled_call_impl is None  # the average and the rehearsal's copies stay eager
    gradients = []
    for model in (plain, compiled):
        torch.manual_seed(1)
        model(torch.ones(5, 6)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for mine, other in zip(*gradients, strict=True):  # other dropout masks would be far away
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    with eagerly(compiled):
        assert compiled._compiled_call_impl is None
    assert compiled._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("amx", "avx", "vendor", "fast"),
    [(True, True, "GenuineIntel", True), (False, True, "GenuineIntel", False), (False, True, "AuthenticAMD", True),
     (False, False, "AuthenticAMD", False)],
)  # fmt: skip
def test_bf16_is_taken_where_the_cpu_is_faster_in_it(monkeypatch, amx, avx, vendor, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    monkeypatch.setattr(device, "_cpu_vendor", lambda: vendor)
    assert device._has_bf16_instructions() is fast
