"""Triton kernels, one file per primitive; imported as ``contrastive_ops.kernels``."""
