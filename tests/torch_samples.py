"""Our linear_cross_entropy on the samples by which torch tests its own, in a process of its own.

Importing torch's list of samples changes global settings. Prints one line of JSON for each sample: its shapes and
options, and what differed, or null.
"""

import json
import random
import sys
import types
import unittest
import warnings

import torch

from contrastive_ops.losses import linear_cross_entropy

OPERATOR = "nn.functional.linear_cross_entropy"


def operators():
    """torch's variants of the operator: whole, in chunks, in chunks without a reduction."""
    try:
        import expecttest  # noqa: F401  (what torch's module needs of it is a base class)
    except ImportError:
        module = types.ModuleType("expecttest")
        module.TestCase = unittest.TestCase
        sys.modules["expecttest"] = module
    from torch.testing._internal.common_methods_invocations import op_db

    return [each for each in op_db if each.name == OPERATOR]


def ours(hidden, weight, target, linear_bias=None, weight_of_classes=None, **options):
    options.pop("options", None)  # how torch cuts the work into chunks
    return linear_cross_entropy(hidden, weight, target, bias=linear_bias, class_weight=weight_of_classes, **options)


def difference(operator, sample, smoothing):
    """What differs from torch's value and gradients, as text, or None."""
    options = {**sample.kwargs, "label_smoothing": smoothing}
    given = (sample.input, *sample.args)
    truth = operator(*given, **options)
    found = ours(*given, weight_of_classes=options.pop("weight", None), **options)
    leaves = [each for each in (*given, options.get("linear_bias")) if each is not None and each.requires_grad]
    cotangent = torch.rand_like(truth)
    if found.shape != truth.shape:
        return f"shape {tuple(found.shape)}, not {tuple(truth.shape)}"
    try:
        torch.testing.assert_close(found, truth.to(found.dtype))
        for gradient, expected in zip(
            torch.autograd.grad(found, leaves, cotangent.to(found.dtype)),
            torch.autograd.grad(truth, leaves, cotangent),
            strict=True,
        ):
            torch.testing.assert_close(gradient, expected)
    except AssertionError as error:
        return str(error)
    return None


def main():
    warnings.simplefilter("ignore")  # where torch cannot work in chunks
    for operator in operators():
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(0)
            random.seed(0)
            for sample in operator.sample_inputs("cpu", dtype, requires_grad=True):
                shapes = [list(each.shape) for each in (sample.input, *sample.args)]
                kind = {"variant": operator.variant_test_name, "dtype": str(dtype), "shapes": shapes}
                for smoothing in (0.0, 0.3):
                    found = difference(operator, sample, smoothing)
                    print(json.dumps({**kind, "smoothing": smoothing, "difference": found}))


if __name__ == "__main__":
    main()
