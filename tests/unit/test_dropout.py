"""Dropout and stochastic depth are in the built network, are seeded, and do not touch evaluation."""

from __future__ import annotations

import pytest
import torch

from goodfit.core.errors import RequestError
from goodfit.models.builder import build_network, create_at_size
from plans import plan_of


def built(**asked):
    plan = plan_of(imgsz=32, seed=0).changed(**{"model": "resnet10t", "dropout": 0.0, "drop_path": 0.0, **asked})
    network, _ = build_network(plan, "abcd")
    return network


def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def output(network, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return network(images())


@pytest.fixture(autouse=True)
def _random_state():
    with torch.random.fork_rng():
        yield


def drop_path_rates(network):
    return [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]


def dropout_rates(network):
    found = [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    return found or [network.drop_rate]  # some networks call the function


@pytest.mark.parametrize("model", ["resnet10t", "mobilenetv2_100"])
@pytest.mark.parametrize(("asked", "rates"), [({"dropout": 0.4}, dropout_rates), ({"drop_path": 0.3}, drop_path_rates)])
def test_the_rate_is_in_the_network_and_works_in_training_only(model, asked, rates):
    (rate,) = asked.values()
    network, plain = built(model=model, **asked), built(model=model)
    assert max(rates(network)) <= rate and max(rates(network)) > 0.5 * rate  # the depth's rate grows towards its end
    assert asked.get("dropout", 0.4) in dropout_rates(network) or "drop_path" in asked
    assert not any(rates(plain)) and network.state_dict().keys() == plain.state_dict().keys()
    for each in (network, plain):
        for module in each.modules():  # batch norm alone would make training differ from evaluation, and drift
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                torch.nn.init.ones_(module.weight)  # some branches begin at zero, and would not be missed
        torch.nn.init.normal_(each.get_classifier().weight, generator=torch.Generator().manual_seed(1))
    network.train()
    one, again, other = output(network, 1), output(network, 1), output(network, 2)
    assert torch.equal(one, again) and not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(output(network.eval(), 1), output(network, 2))
    assert torch.equal(output(network, 1), output(plain.eval(), 1))
    assert torch.equal(output(plain.train(), 1), output(plain, 2))


def test_a_model_without_them_is_a_clear_error():
    with pytest.raises(RequestError, match=r"resnet18.* has no stochastic depth, so drop_path=0\.1 cannot be used"):
        plan_of(drop_path=0.1)  # the facts of this plan say so
    with pytest.raises(RequestError, match=r"vgg11 cannot be built with .*drop_path_rate"):
        create_at_size("vgg11", 32, num_classes=4, drop_path_rate=0.1)
