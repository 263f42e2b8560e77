"""Sums of values under softmaxes, against dense formulas in float64."""

import pytest
import torch

import contrastive_ops
from contrastive_ops import softmax_values, value_distillation
from contrastive_ops.testing import saved_bytes


def drawn(n=9, m=13, d=5, teacher=3, width=4):
    torch.manual_seed(0)
    shapes = ((n, d), (m, d), (n, teacher), (m, teacher), (m, width))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def needing(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def agree(got, expected, inputs):
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(value, inputs, upstream) for value in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("euclidean", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_softmax_values(monkeypatch, euclidean, rows):
    monkeypatch.setattr("contrastive_ops.reference.stream.CHUNK_ELEMENTS", 40)  # three rows at a time
    x, y, *_, values = drawn()
    x, y, values, scale = needing(
        x, y, values, torch.rand(9, dtype=torch.float64) if rows else torch.tensor(1.7).double()
    )
    logits = -torch.cdist(x, y).square() if euclidean else x @ y.T
    expected = ((scale[:, None] if rows else scale) * logits).softmax(1) @ values
    agree(softmax_values(x, y, values, scale=scale, euclidean=euclidean), expected, (x, y, values, scale))


def test_values_are_the_columns_themselves():
    x, y = needing(*drawn()[:2])
    agree(softmax_values(x, y, temperature=0.5), (x @ y.T / 0.5).softmax(1) @ y, (x, y))


@pytest.mark.parametrize("own_scale", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_value_distillation(monkeypatch, given, own_scale):
    monkeypatch.setattr("contrastive_ops.reference.stream.CHUNK_ELEMENTS", 40)
    x, y, tx, ty, values = drawn()
    x, y, scale = needing(x, y, torch.tensor(1.3, dtype=torch.float64))
    teacher_scale = 0.4 if own_scale else None
    p = ((teacher_scale or scale.detach()) * tx @ ty.T).softmax(1)
    expected = (((scale * x @ y.T).softmax(1) - p) @ (values if given else ty)).square().sum(1)
    options = {"scale": scale, "teacher_scale": teacher_scale, "reduction": "none"}
    got = value_distillation(x, y, tx, ty, values if given else None, **options)
    agree(got, expected, (x, y, scale))


def test_second_derivatives():
    x, y, tx, ty, _ = drawn(3, 4)
    assert torch.autograd.gradgradcheck(lambda a, b: value_distillation(a, b, tx, ty, scale=1.0), needing(x, y))


def test_a_student_that_is_its_teacher_has_no_gradient():
    x, y = needing(*drawn()[:2])
    loss = value_distillation(x, y, x, y, scale=20.0)
    assert float(loss.detach()) == 0.0
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, y)))


def test_nothing_of_the_matrix_is_saved():
    x, y, tx, ty, _ = (t.float() for t in drawn(600, 700, 8))
    x, y = needing(x, y)
    saved, _ = saved_bytes(lambda: value_distillation(x, y, tx, ty))
    assert saved < 600 * 700 * 4 / 4


@pytest.mark.parametrize(
    "change,message",
    [
        ({"teacher_x": torch.zeros(8, 3)}, "teacher_x must have as many rows as x, got x"),
        ({"teacher_y": torch.zeros(12, 3)}, "teacher_y must have as many rows as y, got y"),
        ({"values": torch.zeros(12, 3)}, "values must have as many rows as y, got y"),
        ({"teacher_scale": 1.0, "teacher_temperature": 1.0}, "must not both be given"),
    ],
)
def test_what_does_not_fit(change, message):
    x, y, tx, ty, _ = (t.float() for t in drawn())
    with pytest.raises(ValueError, match=f"value_distillation: .*{message}"):
        value_distillation(**{"x": x, "y": y, "teacher_x": tx, "teacher_y": ty, **change})


def test_module():
    x, y, tx, ty, _ = (t.float() for t in drawn())
    layer = contrastive_ops.nn.ValueDistillationLoss(temperature=0.5)
    torch.testing.assert_close(layer(x, y, tx, ty), value_distillation(x, y, tx, ty, temperature=0.5))
