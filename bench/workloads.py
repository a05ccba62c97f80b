"""The networks that are measured, with their data and their counted operations."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Workload(abc.ABC):
    """A network, its loss and how its data look."""

    name: str
    loss: str  # "mse" | "cross_entropy"

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """For tables."""

    @abc.abstractmethod
    def build(self, seed: int) -> nn.Module:
        """The network in evaluation mode, float32."""

    @abc.abstractmethod
    def data(self, num_examples: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """``(X, y)``."""

    @property
    @abc.abstractmethod
    def forward_operations(self) -> float:
        """Of the forward pass of one example; a multiply-add counts two."""

    @property
    @abc.abstractmethod
    def first_operations(self) -> float:
        """The part of them in layers whose input has no tangent and needs no cotangent."""

    @property
    def is_linear(self) -> bool:
        """Whether the outputs are linear in the parameters, so that the Hessian is the Gauss-Newton matrix."""
        return False

    @cached_property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.build(0).parameters())

    @property
    @abc.abstractmethod
    def num_outputs(self) -> int:
        """C, at one position."""

    @property
    def gram_width(self) -> int | None:
        """Operations of one entry of the gradient Gram matrix from factors of single positions; None where layers share weights."""
        return None


@dataclass(frozen=True)
class MLP(Workload):
    """A multilayer perceptron."""

    name: str
    sizes: tuple[int, ...]
    activation: str
    loss: str

    @property
    def layers(self) -> list[tuple[int, int]]:
        """``(in, out)`` of each linear layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    @property
    def title(self) -> str:
        sizes = "-".join(map(str, self.sizes))
        return f"softmax regression {sizes}" if self.is_linear else f"MLP {sizes} {self.activation}"

    @property
    def is_linear(self) -> bool:
        return len(self.sizes) == 2

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules: list[nn.Module] = []
            for i, o in self.layers:
                modules += [nn.Linear(i, o), ACTIVATIONS[self.activation]()]
        return nn.Sequential(*modules[:-1]).eval()

    def data(self, num_examples: int, generator: Generator) -> tuple[Tensor, Tensor]:
        X = torch.randn(num_examples, self.sizes[0], generator=generator)
        if self.loss == "mse":
            return X, torch.randn(num_examples, self.sizes[-1], generator=generator)
        return X, torch.randint(self.sizes[-1], (num_examples,), generator=generator)

    @property
    def forward_operations(self) -> float:
        return 2.0 * sum(i * o for i, o in self.layers)

    @property
    def first_operations(self) -> float:
        return 2.0 * self.layers[0][0] * self.layers[0][1]

    @property
    def num_outputs(self) -> int:
        return self.sizes[-1]

    @property
    def gram_width(self) -> int | None:
        return sum(i + o for i, o in self.layers)


@dataclass(frozen=True)
class Architecture(Workload):
    """Any other network; its operations are counted by torch's own counter.

    Attributes:
        make: builds it.
        shape: of one example; token ids below ``num_tokens`` if that is given.
        first: name of the layer that reads the inputs, if it multiplies.
        token_targets: whether each token has a target, or an example one.
    """

    name: str
    title_text: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_classes: int
    first: str | None = None
    num_tokens: int | None = None
    token_targets: bool = True
    loss: str = "cross_entropy"

    @property
    def title(self) -> str:
        return self.title_text

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                with torch.no_grad():  # running statistics of something
                    model.train()(torch.randn(16, *self.shape))
        return model.eval()

    def data(self, num_examples: int, generator: Generator) -> tuple[Tensor, Tensor]:
        if self.num_tokens is not None:
            size = (num_examples, *self.shape)
            targets = size if self.token_targets else (num_examples,)
            return torch.randint(self.num_tokens, size, generator=generator), torch.randint(self.num_classes, targets, generator=generator)
        X = torch.randn(num_examples, *self.shape, generator=generator)
        return X, torch.randint(self.num_classes, (num_examples,), generator=generator)

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    @cached_property
    def _operations(self) -> tuple[float, float]:
        model = self.build(0)
        X, _ = self.data(1, torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(X)
        counts = counter.get_flop_counts()
        first = 0 if self.first is None else sum(counts[f"{type(model).__name__}.{self.first}"].values())
        return float(counter.get_total_flops()), float(first)

    @property
    def forward_operations(self) -> float:
        return self._operations[0]

    @property
    def first_operations(self) -> float:
        return self._operations[1]


class LeNet(nn.Sequential):
    """Two convolutions and three linear layers on ``[N, 1, 28, 28]``, all of them modules, as Opacus and BackPACK want them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1, self.pool1 = nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.relu2, self.pool2 = nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.head = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.skip = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.skip = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(h + self.skip(x))


class ResNet20(nn.Module):
    """He et al. 2016 for ``[N, 3, 32, 32]``, batch norm in evaluation mode; of modules, as BackPACK wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(_Block(i, o, 2 if o != i else 1) for i, o in pairwise(widths)))
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.blocks(self.relu(self.norm(self.conv(x)))))))


class ResNet18(nn.Module):
    """He et al. 2016 with the stem that is usual for ``[N, 3, 32, 32]``, batch norm in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.blocks = nn.Sequential(*(_Block(i, o, 2 if o != i else 1) for i, o in pairwise(widths)))
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.blocks(self.relu(self.norm(self.conv(x)))))))


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        N, T, E = x.shape
        q, k, v = (t.view(N, T, self.num_heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(E, dim=2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(N, T, E))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A causal transformer on token ids ``[N, T]``; logits ``[N, vocabulary, T]``."""

    def __init__(self, vocabulary: int = 1000, width: int = 128, num_layers: int = 2, num_heads: int = 4, length: int = 64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(_Layer(width, num_heads) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.tokens(x) + self.positions))).transpose(1, 2)


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, inner: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(attended))
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    """BERT's encoder in the sizes of MiniLM-L6 (Wang et al. 2020): token ids ``[N, T]``, logits ``[N, C]`` from the pooled first token."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        width = 384
        self.tokens, self.positions, self.segments = nn.Embedding(30522, width), nn.Embedding(512, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(_EncoderLayer(width, 12, 1536) for _ in range(6)))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        h = self.layers(self.norm(self.tokens(x) + self.positions(places) + self.segments.weight[0]))
        return self.head(torch.tanh(self.pooler(h[:, 0])))


@dataclass(frozen=True)
class Logits(Workload):
    """No network: the data are outputs, so all that is measured is the loss."""

    name: str
    num_classes: int
    loss: str = "cross_entropy"

    @property
    def title(self) -> str:
        return f"cross-entropy, vocabulary {self.num_classes:,}"

    def build(self, seed: int) -> nn.Module:
        return nn.Identity()

    def data(self, num_examples: int, generator: Generator) -> tuple[Tensor, Tensor]:
        X = torch.randn(num_examples, self.num_classes, generator=generator)
        return X, torch.randint(self.num_classes, (num_examples,), generator=generator)

    @property
    def forward_operations(self) -> float:
        return 0.0

    @property
    def first_operations(self) -> float:
        return 0.0

    @property
    def num_outputs(self) -> int:
        return self.num_classes


REGRESSION = MLP("regression", (8, 128, 128, 1), "tanh", "mse")
CLASSIFIER = MLP("classifier", (784, 512, 256, 10), "relu", "cross_entropy")
DIGITS = MLP("digits", (784, 128, 128, 10), "relu", "cross_entropy")
LENET = Architecture("lenet", "LeNet, 1×28×28", LeNet, (1, 28, 28), 10, first="conv1")
RESNET = Architecture("resnet20", "ResNet-20, 3×32×32", ResNet20, (3, 32, 32), 10, first="conv")
RESNET18 = Architecture("resnet18", "ResNet-18, 3×32×32", ResNet18, (3, 32, 32), 10, first="conv")
GPT2 = Architecture(
    "gpt2", "GPT d 768, 12 layers, T 512, vocabulary 50,257", partial(GPT, 50257, 768, 12, 12, 512), (512,), 50257, num_tokens=50257
)
VOCABULARY = Logits("vocabulary", 50257)
TRANSFORMER = Architecture("gpt", "GPT d 128, 2 layers, T 64, vocabulary 1000", GPT, (64,), 1000, num_tokens=1000)
WIDE = MLP("wide", (784, 1024, 1024, 10), "relu", "cross_entropy")
LOGISTIC = MLP("logistic", (784, 10), "relu", "cross_entropy")
RETRAINED = MLP("retrained", (784, 128, 10), "relu", "cross_entropy")
SMALLEST = MLP("smallest", (2, 2, 2), "tanh", "mse")
SENTENCES = Architecture(
    "minilm", "encoder shaped as MiniLM, 22.7 M parameters, T 64", Encoder, (64,), 2, num_tokens=30522, token_targets=False
)
