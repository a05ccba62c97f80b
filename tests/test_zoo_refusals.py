"""Models that no operator can be right about: each is refused by a message that names the node and a remedy, and is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases.capture import Net, dense, normal
from tests.cases.zoo import other, sequence, vision


def net(run: Callable[..., Any], **members: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(run, **{name: make() for name, make in members.items()}).double()


def fc(num_in: int = 4, num_out: int = 3) -> Callable[[], nn.Module]:
    return lambda: dense(num_in, num_out)


def clamps_its_weight(n: Any, x: Tensor) -> Tensor:
    n.fc.weight.data.clamp_(-0.1, 0.1)
    return n.fc(x)


def decays_its_weight(n: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        n.fc.weight.mul_(0.9)
    return n.fc(x)


def replaces_its_weight(n: Any, x: Tensor) -> Tensor:
    n.fc.weight = nn.Parameter(0.9 * n.fc.weight)
    return n.fc(x)


def updates_a_mean(n: Any, x: Tensor) -> Tensor:
    h = n.fc(x)
    n.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return h - n.mean


def packs(n: Any, x: Tensor) -> Tensor:
    lengths = 1 + (x[:, 0, 0] > 0).long()
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return n.out(n.rnn(packed)[1][0][-1])


def stops_early(n: Any, x: Tensor) -> Tensor:
    h = n.fc(x)
    return h if h.max() > 0.5 else torch.tanh(h)


def iterates(n: Any, x: Tensor) -> Tensor:
    for _ in range(int(x.abs().max().item()) + 1):
        x = x + torch.tanh(n.fc(x))
    return x


def samples(n: Any, x: Tensor) -> Tensor:
    mean, log_variance = n.fc(x).chunk(2, -1)
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def contrasts(n: Any, x: Tensor) -> Tensor:
    h = F.normalize(n.fc(x), dim=-1)
    return h @ h.T


@dataclass(frozen=True)
class Refusal:
    """A model, what its refusal says, and in what mode it is handed over."""

    id: str
    make: Callable[[], nn.Module]
    texts: tuple[str, ...]
    X: tuple[int, ...] = (5, 4)
    training: bool = False
    error: str = "UnsupportedModelError"


MIXES = "mixes the examples of a batch"
SEQUENCE = (5, 6, 4)

REFUSALS = (
    Refusal("batch norm in training mode", lambda: vision.ResNet20().double(), ("batch norm stem.1", "blocks.8.bn2", "model.eval()"),
            X=(3, 3, 8, 8), training=True),
    Refusal("batch statistics", net(lambda n, x: n.bn(n.fc(x)), fc=fc(), bn=lambda: nn.BatchNorm1d(3, track_running_stats=False)),
            ("bn (BatchNorm1d)", "batch statistics", "use running statistics")),
    Refusal("functional dropout", net(lambda n, x: F.dropout(n.fc(x), 0.3), fc=fc()), ("dropout is active", "training=self.training")),
    Refusal("dropout inside attention", net(lambda n, x: F.scaled_dot_product_attention(n.fc(x), x, x, dropout_p=0.2), fc=fc(4, 4)),
            ("scaled_dot_product_attention: dropout is active", "dropout_p=0.0 unless self.training"), X=SEQUENCE),
    Refusal("variational noise", net(samples, fc=fc(4, 6)), ("randn_like: draws random numbers", "deterministic")),
    Refusal("early exit", net(stops_early, fc=fc()),
            ("data-dependent", "in stops_early, line", "if h.max() > 0.5", "does not branch on tensor values")),
    Refusal("steps that depend on the data", net(iterates, fc=fc(4, 4)),
            ("data-dependent", "in iterates, line", "does not branch on tensor values")),
    Refusal("examples left out", net(lambda n, x: (lambda h: h[h.sum(-1) > 0])(n.fc(x)), fc=fc()), ("index:", "examples")),
    Refusal("weight clamped in place", net(clamps_its_weight, fc=fc()), ("writes to fc.weight", "aten.clamp_", "compute with a copy")),
    Refusal("weight decayed in place", net(decays_its_weight, fc=fc()), ("fc.weight", "mul_", "no_grad block")),
    Refusal("weight replaced", net(replaces_its_weight, fc=fc()), ("parameter fc.weight: replaced", "local variable")),
    Refusal("running mean", net(updates_a_mean, fc=fc(), mean=lambda: torch.zeros(3)), ("writes to mean", "only if self.training")),
    Refusal("batch mean", net(lambda n, x: n.fc(x) - n.fc(x).mean(0), fc=fc()), (MIXES, "mean:")),
    Refusal("contrastive similarities", net(contrasts, fc=fc()), (MIXES, "matmul:")),
    Refusal("softmax over the batch", net(lambda n, x: n.fc(x).softmax(0), fc=fc()), (MIXES, "aten.softmax")),
    Refusal("ranking", net(lambda n, x: n.fc(x).sort(0).values, fc=fc()), (MIXES, "aten.sort")),
    Refusal("running sum", net(lambda n, x: n.fc(x).cumsum(0), fc=fc()), (MIXES, "cumsum:")),
    Refusal("neighbours", net(lambda n, x: n.fc(x).roll(1, 0), fc=fc()), (MIXES, "roll:")),
    Refusal("reversed batch", net(lambda n, x: n.fc(x).flip(0), fc=fc()), (MIXES, "flip:")),
    Refusal("scale of the batch", net(lambda n, x: n.fc(x) / n.fc(x).abs().max(), fc=fc()), (MIXES, "max")),
    Refusal("relative to the first", net(lambda n, x: n.fc(x) - n.fc(x)[:1], fc=fc()), (MIXES, "slice")),
    Refusal("mean loss as output", net(lambda n, x: n.fc(x).square().mean(), fc=fc()), ("does not count the examples", "[N, ...]")),
    Refusal("divided by N", net(lambda n, x: n.fc(x) / x.shape[0], fc=fc()), (MIXES, "div:")),
    Refusal("attention with time first", net(lambda n, x: n.a(x, x, x)[0], a=lambda: nn.MultiheadAttention(4, 2)),
            ("does not count the examples", "a (MultiheadAttention)", "batch_first=True"), X=SEQUENCE),
    Refusal("encoder with time first", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1).double(),
            (MIXES, "scaled_dot_product_attention", "layers.0.self_attn (MultiheadAttention)", "batch_first=True"), X=SEQUENCE),
    Refusal("LSTM with time first", net(lambda n, x: n.out(n.rnn(x)[0][:, -1]), rnn=lambda: nn.LSTM(4, 3), out=fc(3, 2)),
            ("first axis does not count the examples", "rnn (LSTM)", "batch_first=True", "transpose"), X=SEQUENCE),
    Refusal("GRU with time first, all positions", net(lambda n, x: n.out(n.rnn(x)[0]), rnn=lambda: nn.GRU(4, 3), out=fc(3, 2)),
            ("fixes the number of examples", "rnn (GRU)", "batch_first=True"), X=SEQUENCE),
    Refusal("packed sequences", net(packs, rnn=lambda: nn.LSTM(4, 3, batch_first=True), out=fc(3, 2)),
            ("packed sequences cannot be differentiated", "select each example's last position"), X=SEQUENCE),
    Refusal("two outputs", net(lambda n, x: (n.fc(x), 2 * n.fc(x)), fc=fc()), ("returns 2 tensors", "the loss is computed from")),
    Refusal("a dict of outputs", net(lambda n, x: {"logits": n.fc(x), "hidden": x}, fc=fc()), ("returns 2 tensors instead of one",)),
    Refusal("no output", net(lambda n, x: None, fc=fc()), ("returns 0 tensors instead of one",)),
    Refusal("class numbers", net(lambda n, x: n.fc(x).argmax(-1), fc=fc()), ("argmax: gives torch.int64",)),
    Refusal("complex parameter",
            lambda: Net(lambda n, x: (torch.fft.fft(x) * n.w).real, w=nn.Parameter(torch.randn(4, dtype=torch.complex128))),
            ("w of torch.complex128", "leave this parameter out"), error="DTypeError"),
    Refusal("two devices", lambda: Net(lambda n, x: n.fc(x), fc=dense(4, 3), spare=nn.Linear(3, 2, device="meta", dtype=torch.float64)),
            ("cpu (fc.weight), meta (spare.weight)", "model.to(device)"), error="DeviceError"),
    Refusal("frozen part on another device", lambda: Net(lambda n, x: n.fc(x) @ n.w, fc=dense(4, 3), w=nn.Parameter(
            torch.randn(3, 2, device="meta", dtype=torch.float64), requires_grad=False)),
            ("one device", "meta (w)", "model.to(device)"), error="DeviceError"),
    Refusal("buffer on another device", lambda: Net(lambda n, x: n.fc(x) + n.b, fc=dense(4, 3), b=torch.zeros(3, device="meta")),
            ("one device", "cpu (fc.weight), meta (b)", "model.to(device)"), error="DeviceError"),
)  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.id)
def test_what_cannot_be_right_is_refused(refusal: Refusal) -> None:
    torch.manual_seed(0)
    model = refusal.make().train(refusal.training)
    X = normal(*refusal.X)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the class is compared below
        Plan.of(model, X)
    assert type(caught.value).__name__ == refusal.error
    for text in refusal.texts:
        assert text in str(caught.value)
    assert model.training is refusal.training
    for name, p in model.named_parameters():
        assert p is parameters[name]
        assert p.is_meta or torch.equal(p, before[name])


def test_dropout_modules_are_inactive_whatever_the_mode() -> None:
    model = sequence.GPT().double()
    X = torch.arange(16).reshape(2, 8)
    expected = model.eval()(X).detach()
    assert_close(Plan.of(model.train(), X).linearize(X).outputs, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex128])
def test_frozen_tensors_of_other_types_keep_their_values(dtype: torch.dtype) -> None:
    """Quantised weights, complex rotations: they are computed with as they are."""

    def run(n: Any, x: Tensor) -> Tensor:
        h = n.fc(x)
        return F.linear(h, 0.1 * n.w.to(h.dtype)) if dtype == torch.int8 else torch.view_as_real(torch.view_as_complex(h) * n.w).flatten(1)

    torch.manual_seed(0)
    w = torch.randint(-9, 9, (4, 4), dtype=dtype) if dtype == torch.int8 else torch.randn(2, dtype=dtype)
    shape = nn.Identity() if dtype == torch.int8 else nn.Unflatten(1, (2, 2))
    model = Net(run, fc=nn.Sequential(dense(4, 4), shape), w=nn.Parameter(w, requires_grad=False))
    X = normal(5, 4)
    tape = Plan.of(model, X).linearize(X)
    assert_close(tape.outputs, model(X).detach())
    v = torch.randn(1, sum(p.numel() for p in model.parameters() if p.requires_grad), dtype=torch.float64)
    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    parts = v[0].split([p.numel() for p in theta.values()])
    tangent = {name: part.view_as(p) for part, (name, p) in zip(parts, theta.items(), strict=True)}
    _, expected = torch.func.jvp(lambda t: torch.func.functional_call(model, t, (X,)), (theta,), (tangent,))
    assert_close(tape.jvp(v)[0], expected)


def test_a_selection_that_the_output_does_not_depend_on_is_refused() -> None:
    model = other.LoRA().double()
    model.spare = nn.Linear(2, 2, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="depends on a trainable parameter, got none among spare"):
        Plan.of(model, normal(3, 3, 6), params=["spare.*"])
