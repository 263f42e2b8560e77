"""Losses inside trainers that people use already: the classes of other packages, on fused kernels.

Change the import and nothing else:

    from contrastive_ops.integrations.sentence_transformers import MultipleNegativesRankingLoss
    from contrastive_ops.integrations.open_clip import ClipLoss
    from contrastive_ops.integrations.lightly import NTXentLoss
    from contrastive_ops.integrations.pytorch_metric_learning import SupConLoss
    from contrastive_ops.integrations.pylate import Contrastive
    import contrastive_ops.integrations.transformers  # experts_implementation="contrastive_ops"

A class here is a subclass of the one it is named after: constructors, `isinstance`, configurations, state dicts and
model cards stay. With an option that has no fused form the original runs, and one warning says which option. Names that
a module does not define are those of the other package, so that one import line serves a whole script.

Each module needs the package it is named after, and is imported only when asked for.
"""
