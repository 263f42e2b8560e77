"""The measures of the code run and find what they measure."""

from benchmarks import house, small_batches


def test_a_call_travels_through_files():
    found = house.hops()["clip"]
    assert 1 < found["files"] <= found["calls"] and found["returns"] <= found["changes of file"]


def test_files_that_know_a_rule():
    known = house.files_of("ABOVE_ROWS")
    assert "contrastive_ops/core/rules.py" in known and "contrastive_ops/moe/soft.py" not in known


def test_every_declaration_is_counted():
    assert {name.partition(":")[0] for name in house.declared()} >= {"maxsim", "similarity_topk", "similarity_values"}


def test_small_batches_compare_the_same_mathematics():
    import torch

    for name, side in small_batches.ours().items():
        rows = torch.nn.functional.normalize(torch.randn(8, small_batches.DEPTH), dim=1)
        inputs = [rows, rows.roll(1, 0)][: side.matrices] or [rows[:, : small_batches.EXPERTS]]
        torch.testing.assert_close(
            side.ours(*inputs), side.plain(*inputs), msg=lambda text, name=name: f"{name}: {text}"
        )
