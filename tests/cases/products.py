"""Products between activations: matmul in all its forms, einsum, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import NetworkCase
from tests.cases.layers import Expression, buffer, expression, fc, frozen, normal, parameter, row

sdpa = F.scaled_dot_product_attention


def heads(x: Tensor, num: int) -> Tensor:
    """``[N, L, H * E] -> [N, H, L, E]``."""
    return x.unflatten(-1, (num, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """``[N, H, L, E] -> [N, L, H * E]``."""
    return x.transpose(1, 2).flatten(2)


def two(fn: Callable[[Tensor, Tensor], Tensor], a: int = 4, b: int = 4) -> tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]:
    """An expression of two linear images of x, and its members."""
    return lambda m, x: fn(m.a(x), m.b(x)), {"a": fc(3, a), "b": fc(3, b)}


def pair(id: str, fn: Callable[[Tensor, Tensor], Tensor], notes: str, a: int = 4, b: int = 4, T: int = 5) -> NetworkCase:
    """A row of the rule ``matmul`` whose operands are ``[N, T, a]`` and ``[N, T, b]``."""
    of_both, members = two(fn, a, b)
    return expression(id, "matmul", of_both, notes, normal(T, 3), **members)


def attention(
    id: str, notes: str, *, H: int = 1, E: int = 2, Ev: int | None = None, T: int = 5, cross: bool = False, **options: Any
) -> NetworkCase:
    """A row of attention with three projections; ``options`` go to torch, functions of (module, x) among them are called first."""
    Ev = Ev or E
    num_examples = 5 if T < 65 else 2

    def forward(m: Any, x: Tensor) -> Tensor:
        source = x[:, 1:] if cross else x
        given = {key: value(m, x) if callable(value) else value for key, value in options.items()}
        return joined(sdpa(heads(m.q(x), H), heads(m.k(source), H), heads(m.v(source), H), **given))

    case = expression(id, "attention", forward, notes, normal(T, 3), q=fc(3, H * E), k=fc(3, H * E), v=fc(3, H * Ev))
    return replace(case, num_examples=num_examples)


def shared_bias(*shape: int) -> NetworkCase:
    """Attention with a trained additive bias of this shape, as relative positions have it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return joined(sdpa(heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2), attn_mask=m.bias))

    members = {"q": fc(3, 4), "k": fc(3, 4), "v": fc(3, 4), "bias": lambda: parameter(*shape)}
    name = "-".join(map(str, shape))
    return expression(f"attention-bias-{name}", "attention", forward, "a trained bias on the scores", normal(5, 3), **members)


class Block(nn.Module):
    """``nn.MultiheadAttention`` on linear images of x."""

    def __init__(self, *, batch_first: bool, need_weights: bool, mask: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.batch_first, self.need_weights = batch_first, need_weights
        self.register_buffer("mask", torch.ones(5, 5).tril() == 0 if mask else None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        y: Tensor = self.attend(h, h, h, need_weights=self.need_weights, attn_mask=self.mask)[0]
        return y if self.batch_first else y.transpose(0, 1)


MATMUL = (
    pair("matmul-scores", lambda a, b: a @ b.transpose(-2, -1), "scores: the right operand is read through a transpose"),
    pair("matmul-transposed-left", lambda a, b: a.transpose(1, 2) @ b, "a Gram matrix of features", 3, 4),
    pair("matmul-plain", lambda a, b: a @ b, "no transpose", 5, 4),
    pair("matmul-odd", lambda a, b: a @ b.mT, "sizes that fill no register tile", 2, 2, T=33),
    pair("matmul-one-row", lambda a, b: a[:, :1] @ b.mT, "a matrix of one row"),
    pair("matmul-one-column", lambda a, b: a @ b[:, :1].mT, "a matrix of one column"),
    pair("matmul-outer", lambda a, b: a[:, 0].unsqueeze(2) @ b[:, 0].unsqueeze(1), "a sum of one term", 3, 4),
    pair("matmul-heads", lambda a, b: heads(a, 2) @ heads(b, 2).mT, "heads are a batch axis, read where they lie"),
    pair("matmul-heads-back", lambda a, b: joined((heads(a, 2) @ heads(b, 2).mT) @ heads(b, 2)), "products of products"),
    pair("matmul-broadcast", lambda a, b: heads(a, 2) @ b.unsqueeze(1).mT, "a batch axis of one entry meets two", 4, 2),
    pair("matmul-broadcast-left", lambda a, b: a.unsqueeze(1) @ heads(b, 2).mT, "the same on the left", 2, 4),
    pair("matmul-fewer-axes", lambda a, b: (heads(a, 2).flatten(0, 1) @ heads(b, 2).flatten(0, 1).mT).unflatten(0, (-1, 2)),
         "heads folded into the batch axis"),
    pair("matmul-bmm", lambda a, b: torch.bmm(a, b.transpose(1, 2)), "bmm"),
    pair("matmul-baddbmm", lambda a, b: torch.baddbmm(a @ b.mT, a, b.mT, beta=0.5, alpha=2.0), "c + a b with factors"),
    expression("matmul-itself", "matmul", lambda m, x: (h := m.fc(x)) @ h.mT, "both operands are one value", normal(5, 3), fc=fc(3, 4)),
    expression("matmul-right-untrained", "matmul", lambda m, x: m.fc(x) @ x.mT, "no tangent on the right", normal(5, 3), fc=fc()),
    expression("matmul-left-untrained", "matmul", lambda m, x: x @ m.fc(x).mT, "no tangent on the left", normal(5, 3), fc=fc()),
    expression("matmul-mixing", "matmul", lambda m, x: m.P @ m.fc(x), "a trained matrix mixes positions", normal(5, 3),
               P=lambda: parameter(4, 5), fc=fc()),
    expression("matmul-mixing-input", "matmul", lambda m, x: m.P @ x, "the same on data", normal(5, 3), P=lambda: parameter(4, 5)),
    expression("matmul-mixing-constant", "matmul", lambda m, x: m.P @ m.fc(x), "a constant matrix mixes positions", normal(5, 3),
               P=lambda: buffer(4, 5), fc=fc()),
    expression("matmul-mixing-transposed", "matmul", lambda m, x: m.P.T @ m.fc(x), "its transpose", normal(5, 3),
               P=lambda: parameter(5, 4), fc=fc()),
    expression("matmul-mixing-heads", "matmul", lambda m, x: m.P @ heads(m.fc(x), 2), "a matrix a head", normal(5, 3),
               P=lambda: parameter(2, 4, 5), fc=fc(3, 4)),
    expression("matmul-mixing-row", "matmul", lambda m, x: m.p @ m.fc(x), "a vector weighs positions", normal(5, 3),
               p=lambda: parameter(5), fc=fc()),
    expression("matmul-experts", "matmul", lambda m, x: m.fc(x).unsqueeze(1) @ m.W, "one weight an expert, the input shared",
               normal(5, 3), W=lambda: parameter(2, 3, 4), fc=fc()),
    expression("matmul-experts-first", "matmul", lambda m, x: (m.fc(x) @ m.W).movedim(0, 1), "examples on the second axis",
               normal(3), W=lambda: parameter(2, 3, 4), fc=fc()),
    expression("matmul-tied", "matmul", lambda m, x: m.P @ (m.P @ m.fc(x)), "one matrix twice", normal(4, 3),
               P=lambda: parameter(4, 4), fc=fc()),
)  # fmt: skip

EINSUM = (
    pair("einsum-scores", lambda a, b: torch.einsum("nqd,nkd->nqk", a, b), "scores"),
    pair("einsum-heads", lambda a, b: torch.einsum("nqhd,nkhd->nhqk", a.unflatten(2, (2, 2)), b.unflatten(2, (2, 2))),
         "heads between positions and features"),
    pair("einsum-heads-back", lambda a, b: torch.einsum("nhqk,nkhd->nqhd", torch.einsum("nqhd,nkhd->nhqk", a.unflatten(2, (2, 2)),
                                                                                           b.unflatten(2, (2, 2))), b.unflatten(2, (2, 2))),
         "heads go back between positions and features"),
    pair("bilinear", lambda a, b: F.bilinear(a, b, torch.full((2, 3, 4), 0.5, dtype=a.dtype)), "W is constant, five positions", 3, 4),
    expression("bilinear-trained", "matmul", lambda m, x: m.pair(m.a(x), torch.tanh(m.b(x))), "W and bias at five positions", normal(5, 3),
               a=fc(3, 3), b=fc(3, 4), pair=lambda: nn.Bilinear(3, 4, 2)),
    expression("bilinear-inputs", "matmul", lambda m, x: m.pair(x[:, :3], x[:, 3:]), "of the inputs, without bias", normal(7),
               pair=lambda: nn.Bilinear(3, 4, 2, bias=False)),
    pair("einsum-outer", lambda a, b: torch.einsum("ni,nj->nij", a[:, 0], b[:, 0]), "an outer product", 3, 4),
    pair("einsum-transposed", lambda a, b: torch.einsum("nqd,nkd->nkq", a, b), "the result transposed"),
    pair("einsum-dot", lambda a, b: torch.einsum("ntd,ntd->nt", a, b), "a dot product a position"),
    pair("einsum-all", lambda a, b: torch.einsum("ntd,ntd->n", a, b), "a dot product an example"),
    pair("einsum-split-sum", lambda a, b: torch.einsum("nthd,nshd->nts", a.unflatten(2, (2, 2)), b.unflatten(2, (2, 2))),
         "two axes summed, side by side"),
    pair("einsum-apart-sum", lambda a, b: torch.einsum("nhtd,nshd->nts", heads(a, 2), b.unflatten(2, (2, 2))), "two axes summed, apart"),
    pair("einsum-batch-inside", lambda a, b: torch.einsum("tnd,snd->nts", a.transpose(0, 1), b.transpose(0, 1)),
         "examples on the second axis"),
    expression("einsum-mixing", "matmul", lambda m, x: torch.einsum("st,ntd->nsd", m.P, m.fc(x)), "a matrix mixes positions",
               normal(5, 3), P=lambda: parameter(4, 5), fc=fc()),
    expression("einsum-weight", "matmul", lambda m, x: torch.einsum("nti,hio->nhto", m.fc(x), m.W), "a weight a head",
               normal(5, 3), W=lambda: parameter(2, 3, 4), fc=fc()),
    expression("einsum-experts", "matmul", lambda m, x: torch.einsum("ni,eih->neh", m.fc(x), m.W), "every example meets each weight",
               normal(3), W=lambda: parameter(2, 3, 4), fc=fc()),
    expression("einsum-experts-apart", "matmul", lambda m, x: torch.einsum("neh,eho->neo", m.fc(x), m.W), "a row and a weight an expert",
               normal(2, 3), W=lambda: parameter(2, 3, 4), fc=fc()),
    expression("einsum-basis", "matmul", lambda m, x: torch.einsum("nig,oig->no", m.fc(x), m.W), "two axes summed with a weight",
               normal(5, 3), W=lambda: parameter(4, 5, 3), fc=fc()),
    expression("einsum-left-weight", "matmul", lambda m, x: torch.einsum("oi,ni->no", m.W, m.fc(x)), "a column of every example",
               normal(3), W=lambda: parameter(4, 3), fc=fc()),
)  # fmt: skip

ATTENTION = (
    attention("attention-one-head", "the plain form"),
    attention("attention-three-heads", "several heads", H=3),
    attention("attention-cross", "more queries than keys; wider values", H=2, Ev=3, cross=True),
    attention("attention-one-token", "T = 1: P is 1 and only v counts", H=2, T=1),
    attention("attention-seven", "T = 7", T=7),
    attention("attention-long", "T = 33", T=33, E=1),
    attention("attention-longer", "T = 65: P is computed again instead of kept", T=65, E=1),
    attention("attention-causal", "causal", H=2, is_causal=True),
    attention("attention-causal-cross", "causal with fewer keys: aligned at the first", H=2, is_causal=True, cross=True),
    attention("attention-causal-long", "causal, several blocks of queries", T=65, E=1, is_causal=True),
    attention("attention-scale", "a scale of its own", H=2, scale=0.3),
    attention("attention-mask-bool", "a boolean mask for all", H=2, attn_mask=lambda m, x: torch.ones(5, 5).tril(1) == 1),
    attention("attention-mask-float", "an additive mask for all, with −∞", H=2,
              attn_mask=lambda m, x: torch.zeros(5, 5, dtype=x.dtype).masked_fill(torch.ones(5, 5).triu(2) == 1, -math.inf)),
    attention("attention-mask-keys", "a boolean mask of keys for each example", H=2,
              attn_mask=lambda m, x: ((x[..., 0] > 0) | (torch.arange(5) == 0))[:, None, None, :]),
    attention("attention-mask-hidden", "a mask for each example that hides all keys from some queries", H=2,
              attn_mask=lambda m, x: (x[..., :1] > 0).unsqueeze(1).expand(-1, 1, 5, 5)),
    attention("attention-mask-heads", "an additive mask for each example and head", H=2,
              attn_mask=lambda m, x: torch.stack([x @ x.mT, x[..., :1] - x[..., 1:2].mT], 1)),
    attention("attention-mask-causal-keys", "both at once, in one mask", H=2,
              attn_mask=lambda m, x: (torch.ones(5, 5).tril() == 1) & ((x[..., 0] > 0) | (torch.arange(5) == 0))[:, None, None, :]),
    shared_bias(2, 5, 5),
    shared_bias(5, 5),
    shared_bias(1, 5),
    expression("attention-bias-computed", "attention",
               lambda m, x: joined(sdpa(heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2), attn_mask=(x @ m.b(x).mT).unsqueeze(1))),
               "a bias computed from examples and parameters", normal(5, 3), q=fc(3, 4), k=fc(3, 4), v=fc(3, 4), b=fc()),
    expression("attention-grouped", "attention",
               lambda m, x: joined(sdpa(heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2), enable_gqa=True)),
               "two queries a key head", normal(5, 3), q=fc(3, 8), k=fc(3, 4), v=fc(3, 6)),
    expression("attention-multi-query", "attention",
               lambda m, x: joined(sdpa(heads(m.q(x), 3), heads(m.k(x), 1), heads(m.v(x), 1), enable_gqa=True, is_causal=True)),
               "one key head for all, causal", normal(5, 3), q=fc(3, 6), k=fc(3, 2), v=fc(3, 2)),
    expression("attention-itself", "attention", lambda m, x: sdpa(h := m.fc(x), h, h), "q, k and v are one value, no head axis",
               normal(5, 3), fc=fc(3, 4)),
    expression("attention-leading", "attention", lambda m, x: sdpa(m.q(x), m.k(x), m.v(x)), "two leading axes", normal(2, 2, 4, 3),
               q=fc(3, 2), k=fc(3, 2), v=fc(3, 2)),
    expression("attention-queries", "attention", lambda m, x: sdpa(m.q(x), x, x), "only queries are trained", normal(5, 3), q=fc()),
    expression("attention-keys", "attention", lambda m, x: sdpa(x, m.k(x), x), "only keys are trained", normal(5, 3), k=fc()),
    expression("attention-values", "attention", lambda m, x: sdpa(x, x, m.v(x)), "only values are trained", normal(5, 3), v=fc()),
    expression("attention-learned-queries", "attention",
               lambda m, x: sdpa(m.latent.expand(x.shape[0], -1, -1), m.k(x), m.v(x)), "queries that are parameters",
               normal(5, 3), latent=lambda: parameter(3, 2), k=fc(3, 2), v=fc(3, 2)),
    row("attention-frozen-inside", "attention",
        lambda: Expression(lambda m, x: sdpa(m.q(x), m.k(x), m.v(x)), q=fc()(), k=frozen(fc()()), v=fc()()), "keys have no tangent",
        normal(5, 3)),
    row("multihead-fused", "attention", lambda: Block(batch_first=True, need_weights=False), "the module, attention in one operator",
        normal(5, 3)),
    row("multihead-mask", "attention", lambda: Block(batch_first=True, need_weights=False, mask=True), "with a causal mask", normal(5, 3)),
    row("multihead-weights", "matmul", lambda: Block(batch_first=True, need_weights=True), "the module, attention in steps", normal(5, 3)),
    row("multihead-weights-mask", "matmul", lambda: Block(batch_first=True, need_weights=True, mask=True), "with a mask: baddbmm",
        normal(5, 3)),
    row("multihead-sequence-first", "attention", lambda: Block(batch_first=False, need_weights=False), "examples on the second axis",
        normal(5, 3)),
)  # fmt: skip

PRODUCTS = MATMUL + EINSUM + ATTENTION
