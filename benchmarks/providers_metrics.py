"""Who balances an assignment and who evaluates a ranking: this package, plain torch, pytrec_eval."""

from __future__ import annotations

import torch

from benchmarks.registry import OURS, Inputs, Outcome, Provider, Step

EAGER = "torch eager"
PYTREC_EVAL = "pytrec_eval"
READ = "read"
EPSILON, ITERATIONS = 0.05, 3
# Of this package, and of trec_eval.
MEASURES = {"ndcg@10": "ndcg_cut_10", "precision@10": "P_10", "recall@100": "recall_100", "map@1000": "map_cut_1000"}
CUTS = {"ndcg_cut.10", "P.10", "recall.100", "map_cut.1000"}


def our_sinkhorn() -> Provider:
    """``contrastive_ops.ops.sinkhorn``."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.ops import sinkhorn

        scores = inputs.tensors["scores"]

        def step() -> Outcome:
            plan = sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS)
            return Outcome(plan.square().sum(), {"plan": plan})

        return step

    return Provider(OURS, build, kind="ours", package="contrastive_ops")


def eager_sinkhorn() -> Provider:
    """In place, as SwAV's and DINOv2's code has it."""

    def build(inputs: Inputs) -> Step:
        scores = inputs.tensors["scores"]
        rows, columns = scores.shape

        def step() -> Outcome:
            plan = (scores / EPSILON).exp_()
            for _ in range(ITERATIONS):
                plan.div_(plan.sum(0)).mul_(rows / columns)
                plan.div_(plan.sum(1, keepdim=True))
            return Outcome(plan.square().sum(), {"plan": plan})

        return step

    return Provider(EAGER, build, kind="torch")


def read_scores() -> Provider:
    """The matrix read once."""
    return Provider(READ, lambda inputs: _sum_of(inputs.tensors["scores"]), kind="read")


def our_measures() -> Provider:
    """``contrastive_ops.metrics.retrieval_metrics``, of tensors."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.metrics import retrieval_metrics

        found, judged, grades = (inputs.frozen[name] for name in ("found", "judged", "grades"))
        relevant = torch.arange(len(judged) + 1) * judged.shape[1], judged.flatten(), grades.flatten()

        def step() -> Outcome:
            values = retrieval_metrics(found, relevant, k=(10, 100, 1000), persistence=())
            return Outcome(values["ndcg@10"].mean(), {name: values[name] for name in MEASURES})

        return step

    return Provider(OURS, build, kind="ours", package="contrastive_ops")


def pytrec_eval() -> Provider:
    """``RelevanceEvaluator`` of pytrec_eval with the same measures, of dicts that were made before."""

    def build(inputs: Inputs) -> Step:
        import pytrec_eval as peer

        found, judged, grades = (inputs.frozen[name].tolist() for name in ("found", "judged", "grades"))
        run = {
            str(query): {str(document): float(len(each) - place) for place, document in enumerate(each)}
            for query, each in enumerate(found)
        }
        relevant = {
            str(query): dict(zip(map(str, each), values, strict=True))
            for query, (each, values) in enumerate(zip(judged, grades, strict=True))
        }
        evaluator = peer.RelevanceEvaluator(relevant, CUTS)

        def step() -> Outcome:
            values = evaluator.evaluate(run)
            each = {
                name: torch.tensor([values[str(query)][of_peer] for query in range(len(found))], dtype=torch.float64)
                for name, of_peer in MEASURES.items()
            }
            return Outcome(each["ndcg@10"].mean(), each)

        return step

    return Provider(PYTREC_EVAL, build, package="pytrec-eval-terrier")


def read_found() -> Provider:
    """The lists read once."""
    return Provider(READ, lambda inputs: _sum_of(inputs.frozen["found"]), kind="read")


def _sum_of(x: torch.Tensor) -> Step:
    def step() -> None:
        x.sum()

    return step
