"""Modules: the functions' values, the state_dict, and a learnable temperature that stays in bounds."""

import math

import pytest
import torch

from contrastive_ops import clip, info_nce, nn, nt_xent

PAIRS = [(nn.InfoNCELoss, info_nce), (nn.CLIPLoss, clip), (nn.NTXentLoss, nt_xent)]


@pytest.mark.parametrize("module,function", PAIRS)
@pytest.mark.parametrize("learnable", [False, True])
def test_module_is_the_function(module, function, learnable):
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    loss = module(0.2, learnable=learnable, reduction="none", normalize=True)
    torch.testing.assert_close(loss(a, b), function(a, b, temperature=0.2, reduction="none", normalize=True))


@pytest.mark.parametrize("module,function", PAIRS)
def test_defaults_are_those_of_the_function(module, function):
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    torch.testing.assert_close(module(learnable=False)(a, b), function(a, b))


@pytest.mark.parametrize("module", [m for m, _ in PAIRS])
def test_state_dict(module):
    assert module(learnable=False).state_dict() == {}
    state = module(0.25, learnable=True).state_dict()
    assert list(state) == ["logit_scale"]
    torch.testing.assert_close(state["logit_scale"], torch.tensor(math.log(4.0)))
    fresh = module(learnable=True)
    fresh.load_state_dict(state)
    assert fresh.scale().item() == pytest.approx(4.0)


def test_temperature_learns():
    a = torch.nn.functional.normalize(torch.randn(32, 8), dim=1)
    loss = nn.CLIPLoss(1.0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = loss(a, a).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss(a, a).backward()
        optimizer.step()
    assert loss(a, a).item() < before and loss.logit_scale.item() > 0


def test_scale_is_clipped_in_training_and_can_come_back():
    loss = nn.CLIPLoss(max_scale=100.0)
    loss.logit_scale.data.fill_(9.0)
    assert loss.eval().scale().item() == pytest.approx(math.exp(9.0), rel=1e-5)
    assert loss.train().scale().item() == pytest.approx(100.0, rel=1e-5)
    a, b = torch.randn(16, 8), torch.randn(16, 8)
    loss(a, b).backward()
    assert loss.logit_scale.grad.abs() > 0


def test_info_nce_module_takes_everything():
    query, key, shared, own = torch.randn(6, 4), torch.randn(7, 4), torch.randn(3, 4), torch.randn(6, 2, 4)
    options = {"row_negatives": own, "target": torch.tensor([1, 2, 3, 4, 5, 6]), "weight": torch.rand(6)}
    module = nn.InfoNCELoss(0.3, label_smoothing=0.1)
    expected = info_nce(query, key, shared, temperature=0.3, label_smoothing=0.1, **options)
    torch.testing.assert_close(module(query, key, shared, **options), expected)


def test_repr_says_what_is_set():
    assert "temperature=0.07 (learnable)" in repr(nn.CLIPLoss())
    assert "temperature=0.5 (fixed)" in repr(nn.NTXentLoss())


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="CLIPLoss: options must be among .*reduction, .*, got hard_negatives"):
        nn.CLIPLoss(hard_negatives=0.1)
    with pytest.raises(TypeError, match="got scale"):
        nn.InfoNCELoss(scale=3.0)


def test_modules_can_be_pickled():
    import pickle

    a, b = torch.randn(5, 4), torch.randn(5, 4)
    loss = nn.CLIPLoss(0.3, reduction="sum")
    torch.testing.assert_close(pickle.loads(pickle.dumps(loss))(a, b), loss(a, b))
