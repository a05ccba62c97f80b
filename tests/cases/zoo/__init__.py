"""Whole models, of every architecture family that fits a second of one core: the classes are beside this file, the rows here."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn

from influence_ext import reference
from tests.cases import Inputs, Network, NetworkCase
from tests.cases.zoo import other, sequence, vision


@dataclass(frozen=True, kw_only=True)
class ModelCase(NetworkCase):
    """A whole model.

    Attributes:
        params: passed to every operator as ``params=``; names or patterns.
        generic_share: at most this part of the floating-point work runs in the generic rule.
        dtypes: the data types in which the model computes in one precision throughout.
        quick: part of the short test run, in float64.
        twice: whether PyTorch differentiates all of its operators twice.
    """

    params: tuple[str, ...] | None = None
    generic_share: float = 0.1
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    quick: bool = False
    twice: bool = True
    num_examples: int = 3


def images(*shape: int) -> Callable[[int, Generator], Tensor]:
    """Standard normal ``[N, *shape]``."""
    return lambda N, rng: torch.randn(N, *shape, generator=rng, dtype=torch.float64)


def tokens(length: int, vocabulary: int, first: int = 0) -> Callable[[int, Generator], Tensor]:
    """Token ids ``[N, length]`` from ``first`` on."""
    return lambda N, rng: torch.randint(first, vocabulary, (N, length), generator=rng)


def pair(left: Callable[[int, Generator], Any], right: Callable[[int, Generator], Any]) -> Callable[[int, Generator], Inputs]:
    """Two inputs."""
    return lambda N, rng: (left(N, rng), right(N, rng))


def padded(length: int, vocabulary: int) -> Callable[[int, Generator], Inputs]:
    """Token ids and their padding mask by name; the examples have different lengths, the first is full."""

    def make(N: int, rng: Generator) -> Inputs:
        ids = torch.randint(1, vocabulary, (N, length), generator=rng)
        mask = (torch.arange(length)[None] < length - 2 * torch.arange(N)[:, None].remainder(3)).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    return make


def graphs(N: int, rng: Generator) -> Inputs:
    """Node features ``[N, 5, 3]`` and symmetric adjacency matrices."""
    upper = torch.randint(0, 2, (N, 5, 5), generator=rng).double().triu(1)
    return torch.randn(N, 5, 3, generator=rng, dtype=torch.float64), upper + upper.mT


def table_rows(N: int, rng: Generator) -> Inputs:
    """Two categorical and three numeric columns."""
    return torch.randint(0, 5, (N, 2), generator=rng), torch.randn(N, 3, generator=rng, dtype=torch.float64)


def model(id: str, make: Callable[[], nn.Module], inputs: Callable[[int, Generator], Inputs], notes: str, **more: Any) -> ModelCase:
    """A row; norms are moved away from their initial values."""
    return ModelCase(id=id, make=lambda: vision.randomise(make()), inputs=inputs, notes=notes, **more)


def frozen_but(make: Callable[[], nn.Module], *trained: str) -> Callable[[], nn.Module]:
    """The model with only the parameters whose names contain one of ``trained`` requiring gradients."""

    def build() -> nn.Module:
        network = make()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
        return network

    return build


VISION = (
    model("lenet", vision.lenet, images(1, 16, 16), "the oldest convolutional network", loss="ce-mean", quick=True),
    model("lenet-tanh", vision.lenet_tanh, images(1, 12, 12), "average pooling, padding same", loss="ce-mean"),
    model("resnet20", vision.ResNet20, images(3, 8, 8), "batch norm, shortcuts that subsample and pad, in-place ReLU", loss="ce-mean"),
    model("convnext", vision.ConvNeXt, images(3, 8, 8), "depthwise 7 x 7, norms on either axis, layer scale", loss="ce-mean", quick=True),
    model("unet", vision.UNet, images(1, 8, 8), "transposed convolution, bilinear upsampling, skips", loss="bce-mean"),
    model("mobilenet", vision.mobilenet, images(3, 8, 8), "depthwise, hardswish, squeeze and excite", loss="ce-mean"),
    model("densenet", vision.DenseNet, images(3, 6, 6), "one value read by many concatenations", loss="ce-mean"),
    model("vit", vision.VisionTransformer, images(3, 8, 8), "class token, unbind of qkv", loss="ce-mean", quick=True),
    model("mlp-mixer", vision.Mixer, images(3, 4, 4), "linear layers over positions between transposes", loss="ce-mean"),
    model("swin", vision.Swin, images(3, 8, 8), "windows folded into the batch, relative position table, roll, mask", loss="ce-mean"),
    model("decoder", vision.Decoder, images(5), "transposed convolutions, MSE over an image"),
    model("norms", vision.norms, images(2, 8, 8), "group and instance norm, PReLU, Mish, grouped convolution", loss="ce-mean"),
    model("wavenet", vision.WaveNet, images(1, 14), "causal dilated convolutions, gates, skip path", quick=True),
    model("volumes", vision.volumes, images(1, 4, 4, 4), "three-dimensional convolution", loss="ce-mean"),
    model("spatial-transformer", vision.SpatialTransformer, images(1, 6, 6), "grid sampling by a predicted grid"),
)  # fmt: skip

SEQUENCES = (
    model("gpt", sequence.GPT, tokens(8, 17), "causal attention, learned positions, tied head", quick=True),
    model("gpt2-sdpa", lambda: sequence.gpt2("sdpa"), padded(8, 19), "Hugging Face GPT-2, Conv1D, fused attention with a mask"),
    model("gpt2-eager", lambda: sequence.gpt2("eager"), padded(8, 19), "Hugging Face GPT-2, attention written out"),
    model("bert-sdpa", lambda: sequence.bert("sdpa"), padded(8, 19), "Hugging Face BERT, fused attention, pooler", loss="ce-mean"),
    model("bert-eager", lambda: sequence.bert("eager"), padded(8, 19), "Hugging Face BERT, attention written out", loss="ce-mean"),
    model("hf-llama", sequence.hf_llama, padded(8, 17), "Hugging Face Llama, whose norms and rotations are always in float32",
          dtypes=(torch.float32,)),
    model("distilbert", sequence.distilbert, padded(8, 19), "Hugging Face DistilBERT", loss="ce-mean"),
    model("llama", sequence.Llama, tokens(6, 13), "RMS norm, rotary embedding, SwiGLU, grouped queries, tied head", quick=True),
    model("encoder-batch-first", lambda: sequence.Encoder(True, False, "relu"), images(5, 8), "torch's encoder", loss="ce-mean"),
    model("encoder-time-first", lambda: sequence.Encoder(False, True, "gelu"), images(5, 8), "[T, N, E]", loss="ce-mean", quick=True),
    model("lstm", lambda: sequence.Recurrent(nn.LSTM), tokens(6, 11), "one layer of LSTM", loss="ce-mean"),
    model("lstm-deep", lambda: sequence.Recurrent(nn.LSTM, num_layers=2, bidirectional=True), tokens(6, 11), "two layers, both directions",
          loss="ce-mean"),
    model("lstm-final", lambda: sequence.FinalStates(nn.LSTM, num_layers=2, bias=False), tokens(6, 11), "h_n and c_n, no biases",
          loss="ce-mean"),
    model("gru", lambda: sequence.Recurrent(nn.GRU), tokens(6, 11), "GRU", loss="ce-mean"),
    model("gru-final", lambda: sequence.FinalStates(nn.GRU, bidirectional=True), tokens(6, 11), "h_n of both directions", loss="ce-mean"),
    model("rnn-relu", lambda: sequence.Recurrent(nn.RNN, nonlinearity="relu"), tokens(6, 11), "Elman network, ReLU", loss="ce-mean"),
    model("rnn-tanh", lambda: sequence.FinalStates(nn.RNN, num_layers=2), tokens(6, 11), "Elman network, tanh, two layers", loss="ce-mean"),
    model("lstm-time-first", lambda: sequence.TimeFirst(nn.LSTM), tokens(6, 11), "[T, N, E], a trained first state", loss="ce-mean"),
    model("gru-time-first", lambda: sequence.TimeFirst(nn.GRU), tokens(6, 11), "[T, N, E], a trained first state", loss="ce-mean"),
    model("lstm-projected", lambda: sequence.Recurrent(nn.LSTM, proj_size=3), tokens(6, 11), "projected states: the generic rule",
          loss="ce-mean", generic_share=1.0),
    model("lstm-cells", sequence.Cells, images(5, 3), "a loop of cells: one weight at every step", loss="ce-mean"),
    model("gru-cells", lambda: sequence.PlainCells(nn.GRUCell), images(5, 3), "the same of GRU cells", loss="ce-mean"),
    model("rnn-cells", lambda: sequence.PlainCells(nn.RNNCell), images(5, 3), "the same of Elman cells", loss="ce-mean"),
    model("masked-encoder", sequence.MaskedEncoder, padded(7, 12), "padding mask as an input by name", loss="ce-mean", quick=True),
    model("embedding-bag", lambda: sequence.BagOfWords("mean"), tokens(5, 12), "nn.EmbeddingBag", loss="ce-mean"),
    model("embedding-mean", sequence.MeanEmbedding, tokens(6, 12), "mask from the tokens, normalised mean", loss="ce-mean"),
    model("t5-attention", sequence.RelativeAttention, tokens(5, 12), "relative position bias, einsum, nn.RMSNorm"),
)  # fmt: skip

OTHERS = (
    model("tied-autoencoder", other.TiedAutoencoder, images(9), "W and its transpose", quick=True),
    model("weight-norm", other.weight_norm, images(2, 6), "weights computed from direction and length", loss="ce-mean", quick=True),
    model("spectral-norm", other.spectral_norm, images(5), "weights over their norm; an orthogonal weight by a solve", loss="ce-mean"),
    model("lora", other.LoRA, images(3, 6), "params= selects the low-rank factors", loss="ce-mean", params=("*.A", "*.B"), quick=True),
    model("lora-frozen", frozen_but(other.LoRA, ".A", ".B"), images(3, 6), "the same by requires_grad", loss="ce-mean"),
    model("last-layer", vision.lenet, images(1, 16, 16), "params= selects the head", loss="ce-mean", params=("9.*",)),
    model("norms-only", vision.VisionTransformer, images(3, 8, 8), "params= selects the norms", loss="ce-mean", params=("*norm*",)),
    model("two-towers", other.TwoTowers, pair(images(5), images(3)), "two inputs, a scalar parameter", loss="bce-mean", quick=True),
    model("siamese", other.Siamese, pair(images(4), images(4)), "one encoder used twice", loss="ce-mean"),
    model("deep-sets", other.DeepSets, images(4, 3), "four poolings of one value", loss="ce-mean"),
    model("set-attention", other.SetAttention, images(4, 4), "learned queries without a batch axis", loss="ce-mean"),
    model("graph", other.GraphNet, graphs, "adjacency matrices on the left of products", loss="ce-mean"),
    model("recommender", other.Recommender, table_rows, "integer columns, factorisation machine, crosses", loss="bce-mean"),
    model("experts", other.Experts, images(4), "a stack of weights, einsum", loss="ce-mean"),
    model("routed-experts", other.Routed, images(4), "topk and scatter", loss="ce-mean"),
    model("hypernetwork", other.Hypernetwork, pair(images(4), images(3)), "weights that differ from example to example"),
    model("radiance", other.Radiance, images(3), "sines, slices, two output activations"),
    model("prototypes", other.Prototypes, images(4), "cdist and cosine similarity to parameters", loss="ce-mean", twice=False),
    model("fourier-operator", other.FourierOperator, images(8, 1), "complex numbers between real ones", generic_share=0.3),
    model("complex-rotary", other.ComplexRotary, tokens(6, 12), "a complex buffer"),
    model("euler", other.Euler, images(3), "the same layer ten times"),
    model("bilinear", other.Bilinear, pair(images(4), images(3)), "nn.Bilinear, GLU, max-out", loss="ce-mean"),
)  # fmt: skip

MINILM = model(
    "minilm",
    sequence.SentenceEncoder,
    lambda N, rng: {name: value[:N] for name, value in sequence.sentences().items()},
    "a trained sentence encoder on real sentences, 22 million parameters",
)

ZOO = VISION + SEQUENCES + OTHERS


class WholeModel(Network):
    """A row in one data type. ``model`` is what the user has; its oracles see ``restricted``, where nothing else is trainable.

    Nothing here forms a Jacobian: ``V`` ``[3, P]`` and ``G`` ``[3, N, *out]`` are the operands of the products.
    """

    case: ModelCase

    def __init__(self, case: ModelCase, dtype: torch.dtype) -> None:
        super().__init__(case, dtype)
        self.restricted = copy.deepcopy(self.model)
        for name, parameter in self.restricted.named_parameters():
            chosen = case.params is None or any(fnmatch.fnmatch(name, pattern) for pattern in case.params)
            parameter.requires_grad_(parameter.requires_grad and chosen)
        self.V, self.G = self.random("V", 3, self.P), self.random("G", 3, *self.outputs.shape)

    @property
    def P(self) -> int:
        return sum(p.numel() for p in self.restricted.parameters() if p.requires_grad)

    @cached_property
    def tangents(self) -> Tensor:
        """Float64 ``J_n v``, ``[3, N, *out]``."""
        return reference.jacobian_products(self.restricted, self.X, self.V)

    @cached_property
    def cotangents(self) -> Tensor:
        """Float64 ``Σ_n J_nᵀ g``, ``[3, P]``."""
        return reference.jacobian_transpose_products(self.restricted, self.X, self.G)

    @cached_property
    def products(self) -> Tensor:
        """Float64 Gauss-Newton products, ``[3, P]``."""
        return reference.ggn_products(self.restricted, self.loss_case.oracle(), self.X, self.y, self.V, self.loss_case.reduction)

    @cached_property
    def hessian_products(self) -> Tensor:
        """Float64 products with the Hessian, ``[3, P]``."""
        return reference.hessian_products(self.restricted, self.loss_case.oracle(), self.X, self.y, self.V, self.loss_case.reduction)

    @cached_property
    def grads(self) -> Tensor:
        """Float64 per-example gradients ``[N, P]``."""
        return reference.per_example_grads(self.restricted, self.loss_case.oracle(), self.X, self.y)

    @property
    def peer(self) -> Network:
        """The restricted model as the eager oracles take it."""
        view = copy.copy(self)
        view.model = self.restricted
        return view


@cache
def whole(case: ModelCase, dtype: torch.dtype) -> WholeModel:
    """The row in ``dtype``, built once a session."""
    return WholeModel(case, dtype)
