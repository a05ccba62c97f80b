"""Rows of tables that are read by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tests.cases.layers import frozen, row


def tokens(rows: int, *shape: int) -> Callable[[int, Generator], Tensor]:
    """Indices ``[N, *shape]`` below ``rows``."""
    return lambda N, rng: torch.randint(0, rows, (N, *shape), generator=rng)


class Tied(nn.Module):
    """Embedding, a layer, and the embedding's table again as the head."""

    def __init__(self, rows: int, width: int, padding: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width, padding_idx=padding)
        self.fc = nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every row, at every position."""
        y: Tensor = self.head(self.fc(self.embedding(x)).tanh())
        return y


class Positioned(nn.Module):
    """Embeddings of tokens and of their positions, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.out = nn.Embedding(11, 4), nn.Embedding(9, 4), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The positions are constants of the graph."""
        y: Tensor = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.out(y.flatten(1))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One table read in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``out(table(x) * tanh(table(6 - x)))``."""
        y: Tensor = self.out(self.table(x) * self.table(6 - x).tanh())
        return y


def flat(rows: int, width: int, length: int, **options: int) -> Callable[[], nn.Module]:
    """Maker of an embedding under a linear layer on all its positions."""
    return lambda: nn.Sequential(nn.Embedding(rows, width, **options), nn.Flatten(), nn.Linear(length * width, 2))


class Bag(nn.Module):
    """``nn.EmbeddingBag`` under a linear layer; ``call`` reads it."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.call, self.bag, self.out = call, nn.EmbeddingBag(7, 5, **options), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``out(bag(x))``."""
        y: Tensor = self.out(self.call(self.bag, x))
        return y


def whole_bag(bag: nn.Module, x: Tensor) -> Tensor:
    """Each row of ``x`` a bag."""
    y: Tensor = bag(x)
    return y


BAGS = (
    row("bag-mean", "reduce", lambda: Bag(whole_bag), "the mean of the rows; an index may occur twice", tokens(7, 6)),
    row("bag-sum", "reduce", lambda: Bag(whole_bag, mode="sum"), "their sum", tokens(7, 6)),
    row("bag-max", "reduce_nonlinear", lambda: Bag(whole_bag, mode="max"), "their maximum", tokens(7, 6)),
    row("bag-single", "embedding", lambda: Bag(whole_bag), "N = 1", tokens(7, 4), num_examples=1),
    row("bag-of-one", "embedding", lambda: Bag(whole_bag), "one index a bag", tokens(7, 1)),
    row("bag-offsets", "embedding", lambda: Bag(lambda bag, x: bag(x.flatten(), 4 * torch.arange(x.shape[0]))),
        "offsets that count examples", tokens(7, 4)),
    row("bag-weights", "multiply", lambda: Bag(lambda bag, x: bag(x, per_sample_weights=(x / 3).to(bag.weight.dtype)), mode="sum"),
        "a weight for each index", tokens(7, 4)),
    row("bag-padding", "generic", lambda: Bag(whole_bag, padding_idx=1), "the padding row counts for nothing", tokens(7, 6)),
    row("bag-last-offset", "generic",
        lambda: Bag(lambda bag, x: bag(x.flatten(), 4 * torch.arange(x.shape[0] + 1)), include_last_offset=True),
        "one offset more than bags", tokens(7, 4)),
)  # fmt: skip

EMBEDDINGS = (
    row("embedding", "embedding", flat(7, 5, 4), "indices repeat within and between examples", tokens(7, 4)),
    row("embedding-alone", "embedding", lambda: nn.Embedding(7, 5), "the output itself", tokens(7, 3)),
    row(
        "embedding-vector", "embedding", lambda: nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 2)), "one index an example: [N]", tokens(7)
    ),
    row("embedding-grid", "embedding", lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), "two axes of indices", tokens(5, 2, 3)),
    row("embedding-odd", "embedding", flat(13, 33, 3), "remainders of every loop", tokens(13, 3)),
    row("embedding-one-row", "embedding", flat(1, 3, 4), "all positions meet", tokens(1, 4)),
    row("embedding-padding", "embedding", flat(4, 5, 6, padding_idx=1), "the padding row takes no derivative", tokens(4, 6)),
    row("embedding-padding-last", "embedding", flat(4, 5, 6, padding_idx=-1), "counted from the end", tokens(4, 6)),
    row("embedding-single", "embedding", flat(7, 5, 4), "N = 1", tokens(7, 4), num_examples=1),
    row("embedding-many", "embedding", flat(7, 5, 4), "N larger than a tile of examples, and odd", tokens(7, 4), num_examples=131),
    row("embedding-large", "embedding", flat(503, 6, 4), "most rows unused", tokens(503, 4)),
    row(
        "embedding-frozen",
        "embedding",
        lambda: nn.Sequential(frozen(nn.Embedding(7, 5)), nn.Linear(5, 2)),
        "a constant table",
        tokens(7, 3),
    ),
    row("embedding-positions", "embedding", Positioned, "positions are added", tokens(11, 5)),
    row("embedding-tied", "embedding", lambda: Tied(7, 4), "the table is the head too", tokens(7, 3)),
    row("embedding-tied-bias", "embedding", lambda: Tied(7, 4, bias=True), "the head has a bias", tokens(7, 3)),
    row("embedding-tied-padding", "embedding", lambda: Tied(7, 4, padding=2), "the padding row is trained by the head alone", tokens(7, 3)),
    row("embedding-twice", "embedding", Twice, "two reads of one table: cross terms", tokens(7, 3)),
)

EMBEDDING = EMBEDDINGS + BAGS
