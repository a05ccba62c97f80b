"""Parameters that are read in part: slices, rows of tables at places that depend on no input, and several such reads of one parameter.

No row but those of PADDED may have an expression of parameters: tests/test_capture.py asks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.embedding import tokens
from tests.cases.layers import buffer, expression, fc, normal, parameter, row


def numbers(*values: int) -> Tensor:
    """A buffer of indices."""
    return torch.tensor(values)


class Bert(nn.Module):
    """A block as in Hugging Face's BERT: positions and segments are tables read by buffers of indices."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        width = 8
        self.words, self.segments = nn.Embedding(19, width, padding_idx=0), nn.Embedding(2, width)
        self.positions = nn.Embedding(9, width, padding_idx=padding)
        self.register_buffer("position_ids", torch.arange(9)[None], persistent=False)
        self.register_buffer("segment_ids", torch.zeros(1, 9, dtype=torch.long), persistent=False)
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 3]`` of the first token."""
        N, T = x.shape
        h = self.words(x) + self.segments(self.segment_ids[:, :T]) + self.positions(self.position_ids[:, :T])
        h = self.norm(h)
        q, k, v = self.qkv(h).view(N, T, 3, 2, 4).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, 8))
        h = self.last_norm(h + self.down(F.gelu(self.up(h))))
        y: Tensor = self.head(h[:, 0])
        return y


class GPT(nn.Module):
    """A causal block with learned positions and the head tied to the words."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.norm = nn.Embedding(11, 8), nn.Embedding(9, 8), nn.LayerNorm(8)
        self.attention, self.head = nn.Linear(8, 24), nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, T, 11]``."""
        N, T = x.shape
        h = self.wte(x) + self.wpe(torch.arange(T))
        q, k, v = (part.view(N, T, 2, 4).transpose(1, 2) for part in self.attention(self.norm(h)).split(8, dim=2))
        y: Tensor = self.head(h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(N, T, 8))
        return y


class ViT(nn.Module):
    """Patches behind a class token; the token's position is added before it is repeated (as in masked autoencoders), or after."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early, self.token, self.positions = early, nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 7, 6))
        self.patch, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 3]`` of patches ``[N, 4, 4]``."""
        h, T = self.patch(x), x.shape[1] + 1
        if self.early:
            token = (self.token + self.positions[:, :1]).expand(x.shape[0], -1, -1)
            h = torch.cat([token, h + self.positions[:, 1:T]], dim=1)
        else:
            h = torch.cat([self.token.expand(x.shape[0], -1, -1), h], dim=1) + self.positions[:, :T]
        y: Tensor = self.head(self.norm(h).tanh().prod(dim=1))
        return y


class RelativeBias(nn.Module):
    """Attention whose scores have a bias by relative position, from a table with a column for each head (Swin, T5)."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.table, self.out = nn.Linear(3, 12), nn.Embedding(7, 2), nn.Linear(3, 2)
        grid = torch.arange(4)
        self.register_buffer("index", grid[:, None] - grid[None, :] + 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 4, 2]``."""
        q, k = self.qk(x).view(-1, 4, 2, 2, 3).permute(2, 0, 3, 1, 4)
        bias = self.table(self.index.view(-1)).view(4, 4, 2).permute(2, 0, 1).contiguous()
        weights = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(dim=-1)
        y: Tensor = self.out(weights.mean(dim=1) @ x)
        return y


class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` with other keys than queries: one parameter holds the three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]``."""
        memory = self.memory(x)
        y: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
        return y


SLICES = (
    expression("reads-slice", "affine", lambda m, x: m.fc(x) + m.w[2:7], "the first rows of a table", normal(5, 3),
               fc=fc(), w=lambda: parameter(9, 3)),
    expression("reads-step", "affine", lambda m, x: m.fc(x) + m.w[1::2],
               "every other row", normal(4, 3), fc=fc(), w=lambda: parameter(9, 3)),
    expression("reads-columns", "affine", lambda m, x: m.fc(x) * m.w[:, 1:4], "columns: strides", normal(5, 3), fc=fc(),
               w=lambda: parameter(5, 6)),
    expression("reads-row", "affine", lambda m, x: m.fc(x) * m.w[2] + m.w[0, 1], "a row and an element", normal(5, 3), fc=fc(),
               w=lambda: parameter(5, 3)),
    expression("reads-diagonal", "affine", lambda m, x: m.fc(x) * m.w.diagonal(), "a diagonal", fc=fc(), w=lambda: parameter(3, 3)),
    expression("reads-unbind", "affine", lambda m, x: sum(m.fc(x) * w for w in m.w.unbind(1)), "columns one by one", fc=fc(),
               w=lambda: parameter(3, 2)),
    expression("reads-overlap", "affine", lambda m, x: (m.fc(x) * m.w[0:5]).tanh() * m.w[2:7] + m.w[1:6],
               "slices that overlap: their gradients meet", normal(5, 3), fc=fc(), w=lambda: parameter(7, 3)),
    expression("reads-linear", "linear", lambda m, x: F.linear(F.linear(x, m.w[:4], m.b[1:5]).tanh(), m.w[4:].flatten()[:8].view(2, 4)),
               "weights and a bias that are slices", w=lambda: parameter(9, 3), b=lambda: parameter(6)),
    expression("reads-linear-transposed", "linear", lambda m, x: x @ m.w[1:4].t() + m.w[0], "a slice transposed, and a bias beside it",
               w=lambda: parameter(5, 3)),
    expression("reads-linear-overlap", "linear", lambda m, x: F.linear(F.linear(x, m.w[:4]).tanh()[:, :3], m.w[2:5])
               + F.linear(x, m.w[2:5]), "overlapping weights, one of them twice", w=lambda: parameter(5, 3)),
    expression("reads-chunks", "linear", lambda m, x: sum(F.linear(x, w).tanh() for w in m.w.chunk(3)), "chunks of one parameter",
               normal(5, 3), w=lambda: parameter(6, 3)),
    expression("reads-convolution", "convolution", lambda m, x: F.conv1d(x, m.w[1:3], m.w[0, 0, :2]), "a kernel and a bias", normal(2, 6),
               w=lambda: parameter(4, 2, 3)),
    expression("reads-norm", "layer_norm", lambda m, x: F.layer_norm(m.fc(x), (3,), m.w[0], m.w[1]), "scale and shift in one parameter",
               fc=fc(), w=lambda: parameter(2, 3)),
    expression("reads-table", "embedding", lambda m, x: F.embedding(x, m.w[2:]).tanh() * m.w[:4], "a part of a table, and the rest of it",
               tokens(7, 4), w=lambda: parameter(9, 3)),
    row("reads-cross-attention", "linear", CrossAttention, "split projections", normal(5, 4)),
)  # fmt: skip

TABLES = (
    expression("reads-arange", "affine", lambda m, x: m.fc(x) + F.embedding(torch.arange(x.shape[1]), m.w),
               "positions: a slice", normal(5, 3),
               fc=fc(), w=lambda: parameter(9, 3)),
    expression("reads-zeros", "affine", lambda m, x: m.fc(x) + F.embedding(torch.zeros(5).long(), m.w), "one row, repeated", normal(5, 3),
               fc=fc(), w=lambda: parameter(2, 3)),
    expression("reads-rows", "affine", lambda m, x: m.fc(x) * m.w[[3, 1, 1, 8, 0]], "rows in any order, one of them twice", normal(5, 3),
               fc=fc(), w=lambda: parameter(9, 3)),
    expression("reads-flip", "affine", lambda m, x: m.fc(x) + m.w.flip(0, 1), "elements in reverse", normal(5, 3), fc=fc(),
               w=lambda: parameter(5, 3)),
    expression("reads-repeat", "affine", lambda m, x: m.fc(x) + m.w.repeat(2, 1).roll(1, 0), "repeated and rolled", normal(6, 3), fc=fc(),
               w=lambda: parameter(3, 3)),
    expression("reads-columns-picked", "affine", lambda m, x: m.fc(x) + m.w[:, [2, 0, 2]], "columns by index", normal(5, 3), fc=fc(),
               w=lambda: parameter(5, 4)),
    expression("reads-buffer", "affine", lambda m, x: m.fc(x) * F.embedding(m.i, m.w), "rows that a buffer picks", normal(5, 3), fc=fc(),
               w=lambda: parameter(9, 3), i=lambda: numbers(3, 1, 1, 8, 0)),
    expression("reads-buffer-slice", "affine", lambda m, x: m.fc(x) + F.embedding(m.i[2:], m.w[1:], padding_idx=2),
               "of a part of a table; the padding row takes no derivative", normal(3, 3), fc=fc(), w=lambda: parameter(9, 3),
               i=lambda: numbers(3, 1, 1, 2, 2)),
    expression("reads-buffer-back", "affine", lambda m, x: m.fc(x) + m.w[m.i].view(5, 3), "indices that count from the end", normal(5, 3),
               fc=fc(), w=lambda: parameter(9, 3), i=lambda: numbers(-1, 0, -9, 8, 8)),
    expression("reads-buffer-select", "affine", lambda m, x: m.fc(x) + m.w.index_select(0, m.i), "index_select", normal(5, 3),
               fc=fc(), w=lambda: parameter(9, 3), i=lambda: numbers(3, 1, 1, 8, 0)),
    expression("reads-padding", "affine", lambda m, x: m.fc(x) + F.embedding(torch.tensor([1, 0, 1]), m.w, padding_idx=1),
               "constant indices, padding among them", normal(3, 3), fc=fc(), w=lambda: parameter(3, 3)),
    expression("reads-twice", "affine", lambda m, x: (m.fc(x) * F.embedding(m.i, m.w)).tanh() * m.w[2:7] + m.w[m.j],
               "rows and a slice of one table: their gradients meet", normal(5, 3), fc=fc(), w=lambda: parameter(9, 3),
               i=lambda: numbers(3, 1, 1, 8, 0), j=lambda: numbers(5, 5, 5, 5, 2)),
    expression("reads-token", "broadcast", lambda m, x: torch.cat([F.embedding(m.i, m.w).expand(x.shape[0], 2, 3), m.fc(x)], 1).tanh(),
               "rows as a prompt before every example", normal(2, 3), fc=fc(), w=lambda: parameter(9, 3), i=lambda: numbers(7, 2)),
    expression("reads-sum", "affine", lambda m, x: m.fc(x) - (m.w[:5] + F.embedding(m.i, m.w2)), "a sum of two reads, subtracted",
               normal(5, 3), fc=fc(), w=lambda: parameter(9, 3), w2=lambda: parameter(2, 3), i=lambda: numbers(0, 1, 1, 0, 1)),
    expression("reads-frozen", "affine", lambda m, x: m.fc(x) * F.embedding(m.i, m.w) * m.c[m.i],
               "tables that are not trained", normal(5, 3),
               fc=fc(), w=lambda: parameter(9, 3).requires_grad_(False), c=lambda: buffer(9, 3), i=lambda: numbers(3, 1, 1, 8, 0)),
)  # fmt: skip

MODELS = (
    row("reads-bert", "affine", Bert, "buffers of positions and segments", tokens(19, 5)),
    row("reads-bert-padding", "affine", lambda: Bert(padding=1), "a position that takes no derivative", tokens(19, 5)),
    row("reads-bert-many", "affine", Bert, "several tiles", tokens(19, 5), num_examples=131),
    row("reads-gpt", "affine", GPT, "positions counted, tied head", tokens(11, 6)),
    row("reads-vit", "broadcast", lambda: ViT(early=False), "class token and positions", normal(4, 4)),
    row("reads-vit-early", "broadcast", lambda: ViT(early=True), "their sum", normal(4, 4)),
    row("reads-relative-bias", "affine", RelativeBias, "relative positions", normal(4, 3)),
)


class Perturbed(nn.Module):
    """Derivatives inside the forward pass, which torch.export cannot trace: the model runs as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3]`` of tokens ``[N, T]``."""
        ones = torch.ones(3, dtype=self.out.weight.dtype)
        y: Tensor = torch.func.vmap(lambda t: torch.func.grad(lambda q: self.out(self.words(t).tanh() * q).tanh().sum())(ones))(x)
        return y


# Expressions of parameters and generic nodes, which torch differentiates: its forward mode forgets that a padding row takes no derivative.
PADDED = (
    expression("padded-product", "affine",
               lambda m, x: (m.fc(x) * (F.embedding(m.i, m.w, padding_idx=1) * F.embedding(m.i, m.w[1:]))).tanh(),
               "a product of two reads, one of them padded", normal(5, 3), fc=fc(), w=lambda: parameter(10, 3),
               i=lambda: numbers(3, 1, 1, 8, 0)),
    expression("padded-turned", "affine",
               lambda m, x: (m.fc(x) * F.embedding(torch.tensor([3, 1, 1, 8, 0]), m.w, padding_idx=1).t().reshape(5, 3)).tanh(),
               "constant indices, then moved", normal(5, 3), fc=fc(), w=lambda: parameter(10, 3)),
    expression("padded-scaled", "affine", lambda m, x: (m.fc(x) + F.embedding(m.i, m.w, padding_idx=1) * 1.7).tanh(), "a scaled read",
               normal(5, 3), fc=fc(), w=lambda: parameter(10, 3), i=lambda: numbers(3, 1, 1, 8, 0)),
    expression("padded-weight", "linear", lambda m, x: F.linear(x, F.embedding(m.i, m.w, padding_idx=1)).tanh(), "rows as a weight",
               w=lambda: parameter(10, 3), i=lambda: numbers(3, 1, 1, 8, 0)),
    row("padded-whole", "generic", Perturbed, "a model that runs as a whole", tokens(5, 4)),
)  # fmt: skip

READS = SLICES + TABLES + MODELS
