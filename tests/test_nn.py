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
    torch.testing.assert_close(state["logit_scale"], torch.tensor([math.log(4.0)]))
    fresh = module(learnable=True)
    fresh.load_state_dict(state)
    assert fresh.scale().item() == pytest.approx(4.0)


IDS = torch.tensor([0, 1, 2, 0, 1, 2])
ROWS, COLS = torch.tensor([0, 3, 5]), torch.tensor([1, 1, 4])
LISTS = torch.arange(7), torch.arange(6), torch.ones(6)
# Every other module with what it takes besides two matrices (or one), and the options that differ from the function's.
OTHERS = [
    (nn.SupConLoss, lambda a, b: (a, IDS), {"positives": "log_mean"}),
    (nn.MultiPositiveInfoNCELoss, lambda a, b: (a, IDS), {"mean_over": "pairs"}),
    (nn.SoftInfoNCELoss, lambda a, b: (a, b, LISTS), {"label_smoothing": 0.1}),
    (nn.DCLLoss, lambda a, b: (a, b), {"sigma": 0.5}),
    (nn.DebiasedLoss, lambda a, b: (a, b), {"tau_plus": 0.05}),
    (nn.HCLLoss, lambda a, b: (a, b), {"beta": 0.5}),
    (nn.HNNCELoss, lambda a, b: (a, b), {"alpha": 0.9}),
    (nn.GTELoss, lambda a, b: (a, b), {"partition": "joint"}),
    (nn.GISTEmbedLoss, lambda a, b: (a, b, b, a), {"margin": 0.1}),
    (nn.LateInteractionLoss, lambda a, b: (a.view(6, 2, 4), b.view(6, 2, 4)), {"reduce": "mean"}),
    (nn.MatryoshkaInfoNCELoss, lambda a, b: (a, b), {"dims": (3, 8)}),
    (nn.MatryoshkaCLIPLoss, lambda a, b: (a, b), {"dims": (3, 8), "dim_weights": (1.0, 0.5)}),
    (nn.MatryoshkaNTXentLoss, lambda a, b: (a, b), {"dims": (8,)}),
    (nn.MinedInfoNCELoss, lambda a, b: (a, b, a + b, 2), {"in_batch": False}),
    (nn.MoCoLoss, lambda a, b: (a, b, a + b), {}),
    (nn.SigLIPLoss, lambda a, b: (a, b), {}),
    (nn.MultiPositiveSigLIPLoss, lambda a, b: (a, b, IDS), {"balanced": True}),
    (nn.BiXSELoss, lambda a, b: (a, b, torch.linspace(0, 1, 6)), {}),
    (nn.PairBCELoss, lambda a, b: (a, b, ROWS, COLS, torch.ones(3)), {}),
    (nn.PairMSELoss, lambda a, b: (a, b, torch.linspace(0, 1, 6)), {"reduction": "sum"}),
    (nn.CoSENTLoss, lambda a, b: (a, b, torch.linspace(0, 1, 6)), {}),
    (nn.AnglELoss, lambda a, b: (a, b, torch.linspace(0, 1, 6)), {}),
    (nn.MultiSimilarityLoss, lambda a, b: (a, IDS), {"alpha": 1.0}),
    (nn.BatchContrastiveLoss, lambda a, b: (a, IDS), {"squared": True}),
    (nn.LiftedStructureLoss, lambda a, b: (a, IDS), {"margin": 0.5}),
    (nn.SpectralContrastiveLoss, lambda a, b: (a, b), {"normalize": True}),
    (nn.YAwareInfoNCELoss, lambda a, b: (a, b, torch.linspace(0, 9, 6)), {"bandwidth": 2.0}),
    (nn.TripletLoss, lambda a, b: (a, b, a - b), {"margin": 0.3}),
    (nn.BatchHardTripletLoss, lambda a, b: (a, IDS), {"soft": True}),
    (nn.BatchSemiHardTripletLoss, lambda a, b: (a, IDS, b, IDS), {"margin": 0.4}),
    (nn.ContrastiveLoss, lambda a, b: (a, b, IDS.clamp_max(1)), {"distance": "euclidean"}),
    (nn.VSELoss, lambda a, b: (a, b), {"hardest": True}),
    (nn.EnergyHingeLoss, lambda a, b: (a, b), {"hardest": False}),
    (nn.SimCTGLoss, lambda a, b: (a, IDS), {"margin": 0.4}),
    (nn.SimilarityDistillationLoss, lambda a, b: (a, b, b, a), {"divergence": "js", "symmetric": True}),
    (nn.DistanceDistillationLoss, lambda a, b: (a, b), {"relative": False}),
    (nn.AlignmentLoss, lambda a, b: (a, b), {"power": 1.0}),
    (nn.KoLeoLoss, lambda a, b: (a,), {"eps": 1e-4}),
    (nn.DINOLoss, lambda a, b: (a, b, b), {"assignment": "sinkhorn"}),
    (nn.SwAVLoss, lambda a, b: (a, b, a - b), {"epsilon": 0.2}),
    (nn.GE2ELoss, lambda a, b: (a, IDS), {"kind": "contrast"}),
    (nn.DPOLoss, lambda a, b: (a[:, 0], b[:, 0]), {"kind": "hinge"}),
    (nn.LinearCrossEntropyLoss, lambda a, b: (a, b, IDS), {"reduction": "sum"}),
    (nn.MarginMSELoss, lambda a, b: (a, b), {"reduction": "sum"}),
    (nn.ListwiseCrossEntropyLoss, lambda a, b: (a, b.abs()), {"positives": "log_mean"}),
    (nn.ListwiseDistillationLoss, lambda a, b: (a, b), {"kind": "listmle"}),
    (nn.PairwiseRankDistillationLoss, lambda a, b: (a, b), {"kind": "hinge", "margin": 0.3}),
    (nn.NegativeSamplingLoss, lambda a, b: (a, b, IDS, IDS[:, None]), {"reduction": "sum"}),
]


@pytest.mark.parametrize("module,inputs,options", OTHERS, ids=[m.__name__ for m, *_ in OTHERS])
def test_every_module_is_its_function(module, inputs, options):
    tensors = inputs(torch.randn(6, 8), torch.randn(6, 8))
    torch.testing.assert_close(module(**options)(*tensors), module.function(*tensors, **options))
    if issubclass(module, nn.ScaledLoss):
        learned = module(0.3, learnable=True, **options)
        torch.testing.assert_close(learned(*tensors), module.function(*tensors, temperature=0.3, **options))
        assert "logit_scale" in learned.state_dict()


def test_every_module_is_tested():
    tested = {m for m, *_ in OTHERS} | {m for m, _ in PAIRS} | {nn.SogCLRLoss, nn.CosFaceLoss, nn.ArcFaceLoss}
    bases = {nn.Loss, nn.ScaledLoss, nn.BiasedLoss, nn.PrototypeLoss}
    assert {getattr(nn, name) for name in nn.__all__} - {nn.RunningDenominator} - bases == tested


def test_bias_is_learned_under_the_key_of_checkpoints():
    loss = nn.SigLIPLoss(0.1, -5.0)
    assert list(loss.state_dict()) == ["logit_scale", "logit_bias"] and loss.logit_bias.item() == -5.0
    loss(torch.randn(6, 8), torch.randn(6, 8)).backward()
    assert loss.logit_bias.grad.abs() > 0 and loss.logit_scale.grad.abs() > 0
    assert nn.SigLIPLoss(learnable=False).state_dict() == {}


@pytest.mark.parametrize("module", [nn.CosFaceLoss, nn.ArcFaceLoss])
def test_prototypes_are_learned(module):
    loss = module(3, 8, margin=0.2)
    x = torch.randn(6, 8)
    torch.testing.assert_close(loss(x, IDS), module.function(x, loss.prototypes, IDS, margin=0.2))
    loss(x, IDS).backward()
    assert loss.prototypes.grad.shape == (3, 8) and list(loss.state_dict()) == ["prototypes"]


def test_running_denominators_are_state():
    loss = nn.SogCLRLoss(10, gamma=0.5)
    index = torch.tensor([1, 3, 5, 7, 9, 0])
    loss(torch.randn(6, 8), torch.randn(6, 8), index)
    state = loss.state_dict()["state.log_u"]
    assert state[:, index].isfinite().all() and (state[:, [2, 4, 6, 8]] == -torch.inf).all()


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


def test_scale_is_bounded_and_can_come_back():
    loss = nn.CLIPLoss(max_scale=100.0)
    loss.logit_scale.data.fill_(9.0)
    assert loss.scale().item() == loss.eval().scale().item() == pytest.approx(100.0, rel=1e-5)
    version = loss.logit_scale._version
    a, b = torch.randn(16, 8), torch.randn(16, 8)
    unit = torch.nn.functional.normalize(a)
    loss(a, b).backward()  # of random pairs, for which the scale is too large
    assert loss.logit_scale.grad > 0 and loss.logit_scale._version == version
    loss.logit_scale.grad = None
    loss(unit, unit).backward()  # of pairs that are told apart, which ask for more
    assert loss.logit_scale.grad == 0
    loss.logit_scale.data.fill_(1.0)
    loss(unit, unit).backward()
    assert loss.logit_scale.grad < 0


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
