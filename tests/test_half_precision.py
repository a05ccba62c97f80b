"""Models in bfloat16 and float16: exact at the parameters as they are, to float32 accuracy; nothing of the user's is converted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import influence_ext as ie
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import cast, eager
from tests.cases.zoo import ZOO, WholeModel
from tests.test_zoo import plain

HALVES = (torch.bfloat16, torch.float16)
ROWS = ("lenet", "gpt", "lstm", "weight-norm", "two-towers", "fourier-operator")


def halved(id: str, dtype: torch.dtype) -> WholeModel:
    """A row of the zoo whose parameters and data are in half precision; its oracles see these numbers in float64."""
    model = WholeModel(next(case for case in ZOO if case.id == id), torch.float32)
    model.model, model.restricted = model.model.to(dtype), model.restricted.to(dtype)
    model.X, model.y = cast(model.X, dtype), cast(model.y, dtype)
    model.data = (model.X, model.y)
    del model.__dict__["outputs"]
    return model


def in_float32(model: WholeModel) -> WholeModel:
    """The same numbers as eager PyTorch computes them in float32: the yardstick."""
    view = copy.copy(model)
    view.model, view.X, view.y = copy.deepcopy(model.restricted).float(), cast(model.X, torch.float32), cast(model.y, torch.float32)
    return view


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "f16"])
@pytest.mark.parametrize("id", ROWS)
def test_products_are_those_of_the_given_numbers_in_float32(id: str, dtype: torch.dtype) -> None:
    model = halved(id, dtype)
    peer = in_float32(model)
    tape = Plan.of(model.model, model.X, model.case.params).linearize(model.X)
    assert_close(tape.outputs, model.outputs, eager=plain(eager.outputs, peer))
    assert_close(tape.jvp(model.V), model.tangents, eager=plain(eager.jacobian_products, peer, model.V))
    G = ie.GGN(model.model, model.loss, model.data, params=model.case.params)
    assert G.dtype == torch.float32
    assert "half precision" in G.report()
    assert_close(G.matmat(model.V), model.products, eager=plain(eager.ggn_products, peer, model.V))
    grads = ie.per_example_grads(model.model, model.loss, model.data, params=model.case.params)
    flat = torch.cat([g.reshape(model.N, -1) for g in grads.values()], dim=1)
    assert_close(flat, model.grads, eager=plain(eager.per_example_grads, peer))
    assert {p.dtype for p in model.model.parameters()} == {dtype}


def test_an_adapter_in_float32_on_a_half_precision_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6).bfloat16().requires_grad_(False), nn.Tanh(), nn.Linear(6, 3))
    X, y = torch.randn(5, 4).bfloat16(), torch.randint(3, (5,))
    G = ie.GGN(model, nn.CrossEntropyLoss(), (X, y))
    v = torch.randn(G.shape[0])
    alike = copy.deepcopy(model).float()
    assert torch.allclose(G @ v, ie.GGN(alike, nn.CrossEntropyLoss(), (X.float(), y)) @ v, rtol=1e-6, atol=0)
    with pytest.raises(TypeError, match=r"expected v of dtype torch\.float32, got torch\.bfloat16"):
        G @ v.bfloat16()


def test_parameters_are_read_anew_and_the_hessian_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).bfloat16()
    data = (torch.randn(5, 4).bfloat16(), torch.randn(5, 2).bfloat16())
    ie.GGN(model, nn.MSELoss(), data)
    with torch.no_grad():
        model[0].weight.mul_(2)
    exact = copy.deepcopy(model).double()
    wide = (data[0].double(), data[1].double())
    for kind in (ie.GGN, ie.Hessian):
        assert torch.allclose(kind(model, nn.MSELoss(), data).to_dense().double(), kind(exact, nn.MSELoss(), wide).to_dense(), atol=1e-5)


def test_mixed_precision_that_is_no_half_precision_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3).double(), nn.Linear(3, 2).bfloat16())
    with pytest.raises(TypeError, match="all parameters of one dtype"):
        ie.GGN(model, nn.MSELoss(), (torch.randn(5, 4).double(), torch.randn(5, 2)))
