"""Rows for softmax, sums and other reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.cases import NetworkCase
from tests.cases.layers import Expression, expression, fc, normal, row, unbiased, zero_rows


def reduction(id: str, rule: str, fn: Callable[[Tensor], Tensor], notes: str, inputs: Any = None, **more: Any) -> NetworkCase:
    """``fn`` of a linear layer along the last axis of the inputs."""
    width = int((inputs or normal(3))(1, Generator()).shape[-1])
    return row(id, rule, lambda: Expression(lambda m, x: fn(m.fc(x)), fc=nn.Linear(width, width)), notes, inputs, **more)


SOFTMAXES = (
    reduction("softmax", "softmax", lambda h: h.softmax(-1), "over features"),
    reduction("softmax-33", "softmax", lambda h: h.softmax(1), "remainders of every loop", normal(33), num_examples=3),
    reduction("softmax-1", "softmax", lambda h: h.softmax(-1) * h, "one element: constant", normal(1)),
    reduction("softmax-single", "softmax", lambda h: h.softmax(-1), "N = 1", num_examples=1),
    reduction("softmax-middle", "softmax", lambda h: h.softmax(1), "over an axis that is not the last", normal(4, 3)),
    reduction("softmax-wide", "softmax", lambda h: h.softmax(1), "columns wider than a strip, and odd", normal(2, 67), num_examples=2),
    reduction("softmax-large", "softmax", lambda h: h + (300 * h).softmax(-1),
              "exp overflows without the maximum; added to the logits, since its own derivative underflows"),
    reduction("softmax-masked", "softmax", lambda h: h.masked_fill(torch.eye(3).bool(), float("-inf")).softmax(-1),
              "probabilities of exactly zero", normal(3, 3)),
    expression("softmax-residual", "softmax", lambda m, x: (h := m.fc(x)) + h.softmax(-1), "its cotangent is added", fc=fc()),
    reduction("log-softmax", "softmax", lambda h: F.log_softmax(h, -1), "over features"),
    reduction("log-softmax-middle", "softmax", lambda h: h.log_softmax(1), "over an axis that is not the last", normal(4, 3)),
    reduction("log-softmax-large", "softmax", lambda h: (300 * h).log_softmax(-1), "exp overflows without the maximum"),
    expression("log-softmax-residual", "softmax", lambda m, x: (h := m.fc(x)) + F.log_softmax(h, -1), "its cotangent is added",
               fc=fc()),
)  # fmt: skip

SUMS = (
    reduction("sum-last", "reduce", lambda h: h.sum(-1), "outputs [N]", normal(33)),
    reduction("sum-keepdim", "reduce", lambda h: h.sum(-1, keepdim=True) + h, "the axis is kept"),
    reduction("sum-middle", "reduce", lambda h: h.sum(1), "over positions", normal(4, 3)),
    reduction("sum-wide", "reduce", lambda h: h.sum(1), "columns wider than a strip, and odd", normal(2, 67), num_examples=2),
    reduction("sum-two", "reduce", lambda h: h.sum((1, 2)), "two neighbouring axes", normal(2, 4, 3)),
    reduction("sum-apart", "reduce", lambda h: h.sum((1, 3)), "two axes apart: two passes", normal(2, 4, 3)),
    reduction("sum-all", "reduce", lambda h: h.sum((-1, -2, -3)), "all axes but the examples'", normal(2, 4, 3)),
    reduction("sum-one", "reduce", lambda h: h.sum(1), "an axis of length one", normal(1, 3)),
    reduction("sum-many", "reduce", lambda h: h.sum(1), "N larger than a tile of examples, and odd", normal(2, 3), num_examples=131),
    reduction("mean-last", "reduce", lambda h: h.mean(-1), "mean over features"),
    reduction("mean-pool", "reduce", lambda h: h.mean((2, 3)), "global average pooling of images", normal(2, 3, 5)),
    reduction("mean-apart", "reduce", lambda h: h.mean((1, 3), keepdim=True), "two axes apart", normal(2, 4, 3)),
    expression("mean-centre", "reduce", lambda m, x: (h := m.fc(x)) - h.mean(-1, keepdim=True).expand(-1, 3),
               "its cotangent is added to another", fc=fc()),
    reduction("cumsum", "cumulative_sum", lambda h: h.cumsum(-1), "over features"),
    reduction("cumsum-middle", "cumulative_sum", lambda h: h.cumsum(1), "over positions", normal(4, 3)),
    expression("cumsum-residual", "cumulative_sum", lambda m, x: (h := m.fc(x)) + h.cumsum(1), "its cotangent is added", fc=fc()),
)  # fmt: skip

REDUCTIONS: dict[str, tuple[str, Callable[[Tensor, Any], Tensor]]] = {
    "amax": ("the maximum", lambda h, dim: h.amax(dim)),
    "amin": ("the minimum", lambda h, dim: h.amin(dim)),
    "max": ("the maximum with its index", lambda h, dim: h.max(dim).values),
    "min": ("the minimum with its index", lambda h, dim: h.min(dim).values),
    "logsumexp": ("logarithm of the sum of exponentials", lambda h, dim: (100 * h).logsumexp(dim)),
    "var": ("the variance", lambda h, dim: h.var(dim)),
    "std": ("the standard deviation", lambda h, dim: h.std(dim, correction=0)),
    "norm": ("the Euclidean norm", lambda h, dim: torch.linalg.vector_norm(h, dim=dim)),
    "norm-1": ("the sum of magnitudes", lambda h, dim: torch.linalg.vector_norm(h, 1, dim)),
    "prod": ("the product, of factors away from zero: near it their own rounding rules", lambda h, dim: (1 + 0.5 * h.tanh()).prod(dim)),
}

NONLINEAR = (
    *(
        reduction(f"{name}-{where}", "reduce_nonlinear", lambda h, fn=fn, dim=dim: fn(h, dim), f"{notes}, {where} axis", normal(*shape))
        for name, (notes, fn) in REDUCTIONS.items()
        for where, dim, shape in (("last", -1, (33,)), ("middle", 1, (4, 3)))
    ),
    reduction("amax-two", "reduce_nonlinear", lambda h: h.amax((2, 3)), "two neighbouring axes", normal(2, 3, 4)),
    reduction("amax-keepdim", "reduce_nonlinear", lambda h: h.amax(1, keepdim=True), "the axis is kept", normal(4, 3)),
    row("amax-ties", "reduce_nonlinear", lambda: Expression(lambda m, x: m.fc(x).amax(-1), fc=unbiased(nn.Linear(3, 3))),
        "ties share the derivative", zero_rows(3)),
    row("max-ties", "reduce_nonlinear", lambda: Expression(lambda m, x: m.fc(x).max(-1).values, fc=unbiased(nn.Linear(3, 3))),
        "the first of ties has the derivative", zero_rows(3)),
    reduction("var-offset", "reduce_nonlinear", lambda h: (h + 1000).var(-1), "a mean of 1000 must not cancel it", normal(33)),
    reduction("var-correction", "reduce_nonlinear", lambda h: h.var(-1, correction=2), "another divisor", normal(7)),
    reduction("var-unbiased", "reduce_nonlinear", lambda h: h.var(-1, False), "divided by the number of elements", normal(7)),
    expression("amax-residual", "reduce_nonlinear", lambda m, x: (h := m.fc(x)) - h.amax(-1, keepdim=True).expand(-1, 3),
               "its cotangent is added to another", fc=fc()),
)  # fmt: skip

REDUCTION_ROWS = SOFTMAXES + SUMS + NONLINEAR
