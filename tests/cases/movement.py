"""Rows of operators that move elements: strides, joins, index maps, selections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases.layers import expression, fc, normal, parameter, row


class ClassToken(nn.Module):
    """A trained token in front of the positions, then a layer on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.fc, self.out = parameter(1, 1, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``out([token, fc(x)])``, its first position and the mean of all."""
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), self.fc(x)], dim=1)
        z: torch.Tensor = self.out(y.tanh())
        return torch.cat([z[:, 0], z[:, 1:].flatten(1)], dim=1)


STRIDED = (
    expression("permute", "strided", lambda m, x: m.fc(x).permute(0, 2, 1), "positions and features swap", normal(5, 3), fc=fc(3, 4)),
    expression("transpose-heads", "strided", lambda m, x: m.fc(x).unflatten(-1, (2, 3)).transpose(1, 2), "heads before positions",
               normal(5, 3), fc=fc(3, 6)),
    expression("permute-image", "strided", lambda m, x: m.fc(x).unflatten(1, (2, 3, 5)).permute(0, 2, 3, 1), "channels last", fc=fc(3,
               30)),
    expression("permute-large", "strided", lambda m, x: m.fc(x).unflatten(1, (19, 37)).mT, "larger than a block, odd", fc=fc(3, 703), ),
    expression("batch-in-the-middle", "strided", lambda m, x: m.fc(x).permute(1, 0, 2).flip(0).permute(1, 2, 0),
               "the examples move away and back",
               normal(5, 3), fc=fc(3, 4)),
    expression("slice", "strided", lambda m, x: m.fc(x)[:, 1:4], "a range", fc=fc(3, 6)),
    expression("slice-step", "strided", lambda m, x: m.fc(x)[:, 1::2], "every other", fc=fc(3, 7)),
    expression("select-first", "strided", lambda m, x: m.fc(x)[:, 0], "one position", normal(5, 3), fc=fc(3, 4)),
    expression("select-last", "strided", lambda m, x: m.fc(x)[..., -1], "one feature: outputs [N, T]", normal(5, 3), fc=fc(3, 4)),
    expression("select-scalar", "strided", lambda m, x: m.fc(x)[:, 2], "outputs [N]", fc=fc(3, 4)),
    expression("narrow", "strided", lambda m, x: m.fc(x).narrow(1, 2, 3), "narrow", fc=fc(3, 7)),
    expression("chunk", "strided", lambda m, x: (lambda a, b, c: a * b + c)(*m.fc(x).chunk(3, -1)), "three parts of the features",
               normal(5, 3), fc=fc(3, 12)),
    expression("split", "strided", lambda m, x: (lambda a, b: a + 2 * b)(*m.fc(x).split(2, 1)), "parts of one size", fc=fc(3, 4)),
    expression("split-sizes", "strided", lambda m, x: m.fc(x).split([1, 4, 2], 1)[1], "parts of other sizes, some unused", fc=fc(3, 7)),
    expression("unbind", "strided", lambda m, x: (lambda q, k, v: q * k - v)(*m.fc(x).unflatten(-1, (3, 2)).unbind(2)), "the qkv idiom",
               normal(5, 3), fc=fc(3, 6)),
    expression("qkv-permute", "strided", lambda m, x: (lambda y: y[0] * y[1] - y[2])(m.fc(x).reshape(x.shape[0], 5, 3, 2, 2).permute(2, 0,
               3, 1, 4)),
               "the parts come before the examples", normal(5, 3), fc=fc(3, 12)),
    expression("expand", "strided", lambda m, x: m.fc(x).unsqueeze(1).expand(-1, 5, -1), "repeated positions", fc=fc(3, 4)),
    expression("expand-last", "strided", lambda m, x: m.fc(x).unsqueeze(-1).expand(-1, -1, 3), "repeated features", fc=fc(3, 4)),
    expression("flip", "strided", lambda m, x: m.fc(x).flip(1), "reversed", fc=fc(3, 5)),
    expression("unfold", "strided", lambda m, x: m.fc(x).unfold(1, 3, 2), "windows that overlap", fc=fc(3, 9)),
    expression("diagonal", "strided", lambda m, x: m.fc(x).unflatten(1, (4, 5)).diagonal(dim1=1, dim2=2), "a diagonal", fc=fc(3, 20)),
    row("permute-single", "strided", lambda: nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (3, 4)), Permute(), nn.Linear(3, 2)),
        "N = 1", num_examples=1),
    row("permute-many", "strided", lambda: nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (3, 4)), Permute(), nn.Linear(3, 2)),
        "N larger than a tile of examples, and odd", num_examples=131),
)  # fmt: skip


class Permute(nn.Module):
    """Swap the last two axes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, A, B] -> [N, B, A]``."""
        return x.transpose(1, 2)


JOINED = (
    expression("cat", "concat", lambda m, x: torch.cat([m.a(x), m.b(x)], 1), "features of two layers", a=fc(3, 4), b=fc(3, 2)),
    expression("cat-seq", "concat", lambda m, x: torch.cat([m.a(x), m.b(x)], -1), "along the last of two axes", normal(5, 3), a=fc(3, 4),
               b=fc(3, 2)),
    expression("cat-positions", "concat", lambda m, x: torch.cat([m.a(x), m.a(x).tanh()], 1), "along positions", normal(5, 3), a=fc(3,
               4)),
    expression("cat-input", "concat", lambda m, x: m.b(torch.cat([x, m.a(x), x], 1)), "parts without a tangent", a=fc(3, 4), b=fc(10, 2)),
    expression("cat-same", "concat", lambda m, x: (lambda y: torch.cat([y, y], 1))(m.a(x)), "the same value twice", a=fc(3, 4)),
    expression("stack", "concat", lambda m, x: torch.stack([m.a(x), m.b(x)], 1), "a new axis", a=fc(3, 4), b=fc(3, 4)),
    expression("stack-last", "concat", lambda m, x: torch.stack([m.a(x), m.b(x)], -1), "a new last axis", a=fc(3, 4), b=fc(3, 4)),
    row("class-token", "broadcast", ClassToken, "a trained token for every example", normal(5, 3)),
    row("class-token-single", "broadcast", ClassToken, "N = 1", normal(5, 3), num_examples=1),
    row("class-token-many", "broadcast", ClassToken, "N larger than a tile of examples, and odd", normal(5, 3), num_examples=131),
    expression("queries", "broadcast", lambda m, x: m.q.unsqueeze(0).expand(x.shape[0], -1, -1) * m.fc(x).unsqueeze(1), "learned queries",
               fc=fc(3, 4),
               q=lambda: parameter(5, 4)),
)  # fmt: skip

MAPPED = (
    expression("pad", "gather", lambda m, x: F.pad(m.fc(x), (1, 2)), "zeros", fc=fc(3, 4)),
    expression("pad-value", "gather", lambda m, x: F.pad(m.fc(x), (1, 2), value=0.7).tanh(), "a number", fc=fc(3, 4)),
    expression("pad-image", "gather", lambda m, x: F.pad(m.fc(x).unflatten(1, (2, 3, 4)), (1, 0, 2, 1)), "two axes", fc=fc(3, 24)),
    expression("pad-crop", "strided", lambda m, x: F.pad(m.fc(x), (-1, -2)), "negative: a slice", fc=fc(3, 7)),
    expression("pad-reflect", "gather", lambda m, x: F.pad(m.fc(x).unflatten(1, (2, 4)), (2, 1), mode="reflect"), "reflection", fc=fc(3,
               8)),
    expression("pad-replicate", "gather", lambda m, x: F.pad(m.fc(x).unflatten(1, (2, 4)), (2, 1), mode="replicate"), "replication",
               fc=fc(3, 8)),
    expression("roll", "gather", lambda m, x: m.fc(x).roll(2, 1), "circular", fc=fc(3, 5)),
    expression("index-constant", "gather", lambda m, x: m.fc(x)[:, [3, 0, 0, 4]], "repeated indices", fc=fc(3, 5)),
    expression("index-select", "gather", lambda m, x: m.fc(x).index_select(1, torch.tensor([3, 0, 0, 4])), "index_select", fc=fc(3, 5)),
    expression("repeat", "gather", lambda m, x: m.fc(x).repeat(1, 3), "copies one after another", fc=fc(3, 4)),
    expression("tile", "gather", lambda m, x: m.fc(x).tile(1, 2), "the same under another name",
               fc=fc(3, 4)),
    expression("repeat-interleave", "gather", lambda m, x: m.fc(x).repeat_interleave(3, 1), "each element three times", fc=fc(3, 4)),
    expression("tril", "gather", lambda m, x: m.fc(x).unflatten(1, (4, 4)).tril(-1), "a triangle", fc=fc(3, 16)),
    expression("pixel-shuffle", "gather", lambda m, x: F.pixel_shuffle(m.fc(x).unflatten(1, (8, 3, 2)), 2), "channels to pixels", fc=fc(3,
               48)),
    expression("take-along", "select_axis", lambda m, x: m.fc(x).gather(1, x.argsort(1)), "indices of each example", fc=fc(3, 5)),
    expression("take-along-seq", "select_axis", lambda m, x: m.fc(x).gather(1, x.argsort(1)[..., :2]), "along positions", normal(5, 3),
               fc=fc(3, 4)),
    expression("pool-position", "select_axis", lambda m, x: m.fc(x)[torch.arange(x.shape[0]), x[..., 0].argmax(1)],
               "one position of each example",
               normal(5, 3), fc=fc(3, 4)),
    expression("pool-from-end", "select_axis", lambda m, x: m.fc(x)[torch.arange(x.shape[0]), x[..., 0].argmax(1) - 5],
               "negative indices",
               normal(5, 3), fc=fc(3, 4)),
)  # fmt: skip

GENERIC = (
    expression("topk", "generic", lambda m, x: m.fc(x).topk(2, 1).values, "which elements depends on values", fc=fc(3, 5)),
    expression("sort", "generic", lambda m, x: m.fc(x).sort(1).values * torch.arange(1.0, 6.0, dtype=x.dtype), "sorted", fc=fc(3, 5)),
    expression("topk-indices", "generic", lambda m, x: (lambda y: m.b(x).gather(1, y.topk(2, 1).indices) * y.topk(2, 1).values)(m.fc(x)),
               "indices that depend on parameters", fc=fc(3, 5), b=fc(3, 5)),
    expression("scatter", "generic", lambda m, x: torch.zeros(x.shape[0], 7, dtype=x.dtype).scatter(1, x.argsort(1), m.fc(x)),
               "to places of each example", fc=fc(3, 3)),
    expression("scatter-add", "generic", lambda m, x: m.b(x).scatter_add(1, x.argsort(1) // 2, m.fc(x)), "several to one place",
               fc=fc(3, 3), b=fc(3, 4)),
    expression("affine-grid", "generic", lambda m, x: F.grid_sample(x, F.affine_grid(m.fc(x.flatten(1)).view(-1, 2, 3), x.shape,
               align_corners=False), align_corners=False).flatten(1), "a predicted grid", normal(1, 4, 4), fc=fc(16, 6)),
    expression("grid-sample", "generic", lambda m, x: F.grid_sample(m.conv(x), x[:, :2].permute(0, 2, 3, 1).tanh(), padding_mode="border",
               align_corners=True).flatten(1), "a grid from the data", normal(3, 4, 4), conv=lambda: nn.Conv2d(3, 2, 2)),
)  # fmt: skip

MOVEMENT = STRIDED + JOINED + MAPPED + GENERIC
