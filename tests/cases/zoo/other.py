"""Whole models of other kinds: tied, constrained, adapted, on sets, pairs, tables and graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class TiedAutoencoder(nn.Module):
    """Decoder weights are the encoder's transposed."""

    def __init__(self, features: int = 9, code: int = 4):
        super().__init__()
        self.W1, self.W2 = nn.Parameter(torch.randn(6, features) / 3), nn.Parameter(torch.randn(code, 6) / 2)
        self.b1, self.b2, self.c1, self.c2 = (nn.Parameter(0.1 * torch.randn(k)) for k in (6, code, 6, features))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(F.linear(torch.tanh(F.linear(x, self.W1, self.b1)), self.W2, self.b2))
        return F.linear(torch.tanh(F.linear(code, self.W2.T, self.c1)), self.W1.T, self.c2)


def weight_norm() -> nn.Module:
    """Weights as a direction and a length, linear and convolutional."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(2, 4, 3)),
        nn.ReLU(),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(16, 5)),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def spectral_norm() -> nn.Module:
    """Weights over their largest singular value, as estimated by the buffers' vectors; an orthogonal layer on top."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(5, 6)),
        nn.ELU(),
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        nn.ELU(),
        parametrizations.orthogonal(nn.Linear(6, 3), orthogonal_map="cayley"),
    )


class LowRank(nn.Module):
    """A frozen linear layer plus a trained update ``B A``."""

    def __init__(self, layer: nn.Linear, rank: int = 2, scale: float = 1.5):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.A = nn.Parameter(0.3 * torch.randn(rank, layer.in_features))
        self.B = nn.Parameter(0.3 * torch.randn(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * (x @ self.A.T) @ self.B.T


class LoRA(nn.Module):
    """A small network whose linear layers are adapted; nothing is frozen here: ``params=`` selects."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc1, self.fc2 = LowRank(nn.Linear(6, 10)), LowRank(nn.Linear(10, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm(x))))).mean(1))


class TwoTowers(nn.Module):
    """Two encoders with normalised outputs and a learned temperature; one score a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
        self.right = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(self.left(a), dim=-1), F.normalize(self.right(b), dim=-1)
        return (a * b).sum(-1) * self.temperature.exp()


class Siamese(nn.Module):
    """One encoder for both inputs, compared by absolute difference and product."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.head = nn.Linear(10, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a), self.encoder(b)
        return self.head(torch.cat([(a - b).abs(), a * b], dim=-1))


class DeepSets(nn.Module):
    """Elements of a set with sum, mean, maximum and standard deviation as pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 6), nn.ELU(), nn.Linear(6, 5))
        self.rho = nn.Sequential(nn.Linear(20, 6), nn.ELU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.phi(x)
        return self.rho(torch.cat([h.sum(1), h.mean(1), h.max(1).values, h.std(1)], dim=-1))


class SetAttention(nn.Module):
    """Learned queries attend to the elements of a set (Perceiver), with cross-attention by ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, 6))
        self.embed = nn.Linear(4, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        h, _ = self.attention(queries, self.embed(x), self.embed(x))
        return self.head((h + queries).flatten(1))


class GraphNet(nn.Module):
    """Graph convolution and graph attention on dense adjacency matrices, which are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.value = nn.Linear(3, 6), nn.Linear(6, 6, bias=False)
        self.source, self.target = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        looped = adjacency + torch.eye(adjacency.shape[-1], dtype=adjacency.dtype)
        scale = looped.sum(-1).rsqrt()
        h = F.relu((scale.unsqueeze(-1) * looped * scale.unsqueeze(-2)) @ self.conv(x))
        h = self.value(h)
        scores = F.leaky_relu((h @ self.source).unsqueeze(-1) + (h @ self.target).unsqueeze(-2), 0.2)
        weights = scores.masked_fill(looped == 0, float("-inf")).softmax(-1)
        return self.head(F.elu(weights @ h).mean(1))


class Recommender(nn.Module):
    """Categorical and numeric columns: embeddings, a factorisation machine, crossed features (DCN) and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(k, 4) for k in (5, 7))
        self.numeric = nn.Linear(3, 4)
        self.cross = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))
        self.out = nn.Linear(12, 1)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        parts = [table(categories[:, i]) for i, table in enumerate(self.tables)] + [self.numeric(numbers)]
        stacked = torch.stack(parts, dim=1)
        pairs = 0.5 * (stacked.sum(1).square() - stacked.square().sum(1)).sum(-1, keepdim=True)
        first = x = stacked.flatten(1)
        for layer in self.cross:
            x = first * layer(x) + x
        return (self.mlp(first) + self.out(x) + pairs).squeeze(-1)


class Experts(nn.Module):
    """Soft mixture of experts: the experts' weights are one stacked tensor."""

    def __init__(self, experts: int = 3):
        super().__init__()
        self.gate = nn.Linear(4, experts)
        self.W, self.b = nn.Parameter(torch.randn(experts, 4, 5)), nn.Parameter(torch.randn(experts, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        return self.head(torch.einsum("ne,neo->no", gates, torch.tanh(torch.einsum("ni,eio->neo", x, self.W) + self.b)))


class Routed(nn.Module):
    """Sparse mixture of experts: the best two of three, by sorting the gates."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        top = self.gate(x).topk(2, dim=-1)
        gates = torch.zeros(x.shape[0], 3, dtype=x.dtype).scatter(-1, top.indices, top.values.softmax(-1))
        return self.head(sum(gates[:, i : i + 1] * F.silu(expert(x)) for i, expert in enumerate(self.experts)))


class Hypernetwork(nn.Module):
    """One network computes the weights of another (FiLM on top), per example."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.film = nn.Linear(3, 8), nn.Linear(3, 4)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        W = self.weights(context).view(-1, 2, 4)
        scale, shift = self.film(context).chunk(2, dim=-1)
        return self.head(scale * torch.tanh(torch.bmm(W, x.unsqueeze(-1)).squeeze(-1)) + shift)


class Radiance(nn.Module):
    """Coordinates through fixed Fourier features and sines (NeRF, SIREN), with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(15, 8), nn.Linear(8 + 15, 8), nn.Linear(8, 4)
        self.register_buffer("bands", 2.0 ** torch.arange(2))

    def forward(self, x: Tensor) -> Tensor:
        angles = (x.unsqueeze(-1) * self.bands).flatten(1)
        features = torch.cat([x, angles.sin(), angles.cos()], dim=-1)
        h = torch.sin(3.0 * self.fc1(features))
        h = torch.sin(self.fc2(torch.cat([h, features], dim=-1)))
        out = self.head(h)
        return torch.cat([torch.sigmoid(out[..., :3]), F.softplus(out[..., 3:])], dim=-1)


class Prototypes(nn.Module):
    """Distances to learned centres (RBF), and cosine similarities to learned directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.centres, self.directions = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4, 3))
        self.log_width = nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        radial = torch.exp(-(torch.cdist(h, self.centres) * self.log_width.exp()).square())
        cosine = F.cosine_similarity(h.unsqueeze(1), self.directions.unsqueeze(0), dim=-1)
        return self.head(torch.cat([radial, cosine], dim=-1))


class Euler(nn.Module):
    """One vector field integrated by ten steps: the same weights at every step, time as a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        for step in range(10):
            time = torch.full_like(x[:, :1], step / 10)
            x = x + 0.1 * self.field(torch.cat([x, time], dim=-1))
        return x


class Bilinear(nn.Module):
    """``nn.Bilinear``, gated linear units and max-out."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(4, 3, 6)
        self.expand = nn.Linear(3, 6)
        self.head = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        h = F.glu(self.pair(a, b), dim=-1)
        return self.head(self.expand(h).view(-1, 3, 2).amax(-1))


class FourierOperator(nn.Module):
    """A Fourier neural operator: products of low frequencies with complex weights, held as pairs of real numbers."""

    def __init__(self, channels: int = 3, modes: int = 4):
        super().__init__()
        self.lift, self.skip, self.head = nn.Linear(1, channels), nn.Conv1d(channels, channels, 1), nn.Linear(channels, 1)
        self.modes = nn.Parameter(0.3 * torch.randn(channels, channels, modes, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).transpose(1, 2)
        low = torch.fft.rfft(h)[..., : self.modes.shape[2]]
        low = torch.einsum("bik,iok->bok", low, torch.view_as_complex(self.modes))
        return self.head(F.gelu(torch.fft.irfft(low, n=h.shape[-1]) + self.skip(h)).transpose(1, 2))


class ComplexRotary(nn.Module):
    """Rotary positions as products with a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.queries = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.register_buffer("turns", torch.polar(torch.ones(6, 4), torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.5, 0.2, 0.1]))))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        q = torch.view_as_complex(self.queries(h).view(*h.shape[:2], 4, 2)) * self.turns
        return F.scaled_dot_product_attention(torch.view_as_real(q).flatten(2), h, h, is_causal=True)
