"""ParameterSpace: flat vectors in ``named_parameters()`` order, tied parameters once, selections, and errors that name
the culprit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError
from influence_ext.params import ParameterSpace


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def tied() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).double()
    model["b"].weight = model["a"].weight
    return model


def test_layout_follows_named_parameters() -> None:
    model = mlp()
    space = ParameterSpace.of(model)
    assert space.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert space.shapes == ((4, 3), (4,), (2, 4), (2,))
    assert space.offsets == (0, 12, 16, 24)
    assert (space.num_parameters, space.dtype, space.device) == (26, torch.float64, torch.device("cpu"))
    assert torch.equal(space.values(model), torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert space.describe(2) == "0.weight (12), 0.bias (4), ..."


def test_values_are_a_detached_copy() -> None:
    model = mlp()
    space = ParameterSpace.of(model)
    theta = space.values(model)
    assert not theta.requires_grad
    theta.zero_()
    assert float(model[0].weight.detach().abs().sum()) > 0


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_flatten_and_unflatten_are_inverse(lead: tuple[int, ...]) -> None:
    space = ParameterSpace.of(mlp())
    flat = torch.randn(*lead, space.num_parameters, dtype=torch.float64)
    named = space.unflatten(flat)
    assert {name: tuple(t.shape) for name, t in named.items()} == {
        name: (*lead, *shape) for name, shape in zip(space.names, space.shapes, strict=True)
    }
    assert torch.equal(space.flatten(named), flat)
    assert torch.equal(space.flatten(dict(reversed(named.items()))), flat)
    assert torch.equal(space.flatten(list(named.values())), flat)
    assert torch.equal(space.flatten(tuple(named.values())), flat)


def test_unflatten_gives_views_of_transposed_vectors_too() -> None:
    space = ParameterSpace.of(mlp())
    columns = torch.zeros(space.num_parameters, 3, dtype=torch.float64)
    space.unflatten(columns.T)["2.weight"][1, 1, 2] = 7.0
    assert columns[16 + 6, 1] == 7.0


def test_scalar_and_empty_parameters() -> None:
    model = nn.ParameterDict({"s": torch.tensor(2.0), "e": torch.zeros(0, 3), "v": torch.ones(2)})
    space = ParameterSpace.of(model)
    assert space.num_parameters == 3
    assert dict(zip(space.names, space.shapes, strict=True)) == {"s": (), "e": (0, 3), "v": (2,)}
    assert torch.equal(space.values(model), torch.cat([p.detach().reshape(-1) for p in model.values()]))
    for flat in (torch.randn(3), torch.randn(4, 3)):
        assert torch.equal(space.flatten(space.unflatten(flat)), flat)


def test_tied_parameters_count_once_under_their_first_name() -> None:
    model = tied()
    space = ParameterSpace.of(model)
    assert space.names == ("a.weight", "a.bias", "b.bias")
    assert space.aliases == {"b.weight": "a.weight"}
    assert [space.canonical(n) for n in ("b.weight", "a.weight", "b.bias")] == ["a.weight", "a.weight", "b.bias"]
    named = space.unflatten(torch.arange(15.0, dtype=torch.float64))
    named["b.weight"] = named.pop("a.weight")
    assert torch.equal(space.flatten(named), torch.arange(15.0, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"got a\.weight under several of its names"):
        space.flatten({**named, "a.weight": named["b.weight"]})


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (lambda m: "2.weight", ["2.weight"]),
        (lambda m: ["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (lambda m: "*.weight", ["0.weight", "2.weight"]),
        (lambda m: ["0.*", "0.weight"], ["0.weight", "0.bias"]),
        (lambda m: m[2].bias, ["2.bias"]),
        (lambda m: m[2].parameters(), ["2.weight", "2.bias"]),
        (lambda m: dict(m.named_parameters()), ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (lambda m: [m[0].bias, "2.b*"], ["0.bias", "2.bias"]),
    ],
)
def test_selection_by_name_pattern_and_tensor(select: Callable[[Any], Any], names: list[str]) -> None:
    model = mlp()
    assert list(ParameterSpace.of(model, select(model)).names) == names


def test_selecting_a_tied_parameter_by_either_name() -> None:
    model = tied()
    for select in ("b.weight", "a.weight", model["b"].weight, ["a.weight", "b.weight"]):
        space = ParameterSpace.of(model, select)
        assert space.names == ("a.weight",)
        assert space.aliases == {"b.weight": "a.weight"}
    assert ParameterSpace.of(model, "a.bias").aliases == {}


def test_frozen_parameters_are_left_out() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    assert ParameterSpace.of(model).names == ("0.bias", "2.weight", "2.bias")
    assert ParameterSpace.of(model, "0.*").names == ("0.bias",)


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


def with_value(value: float) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        with torch.no_grad():
            model[2].bias[1] = value
        return model

    return change


def with_parameter(p: Tensor) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        model.register_parameter("extra", nn.Parameter(p))
        return model

    return change


@pytest.mark.parametrize(
    ("change", "params", "error", "texts"),
    [
        (lambda m: m, "2.weigth", ArgumentError, ["'2.weigth', which matches none", "2.weight"]),
        (lambda m: m, ["2.bias", "conv.*"], ArgumentError, ["'conv.*'"]),
        (lambda m: m, torch.zeros(4, 3), ArgumentError, ["shape [4, 3] that is none of them"]),
        (lambda m: m, [3], ArgumentError, ["got int"]),
        (lambda m: m, [], ArgumentError, ["at least one trainable parameter, got an empty params="]),
        (frozen, None, ArgumentError, ["4 parameters with requires_grad=False", "requires_grad_(True)"]),
        (frozen, "0.bias", ArgumentError, ["got 0.bias with requires_grad=False"]),
        (lambda m: nn.Tanh(), None, ArgumentError, ["a model without parameters"]),
        (lambda m: nn.LazyLinear(2), None, ArgumentError, ["weight, bias of a lazy module"]),
        (with_parameter(torch.zeros(2, dtype=torch.complex64)), None, DTypeError, ["extra of torch.complex64"]),
        (with_parameter(torch.zeros(2)), None, DTypeError, ["torch.float64 (0.weight)", "torch.float32 (extra)"]),
        (
            with_parameter(torch.zeros(2, device="meta").double()),
            None,
            DeviceError,
            ["cpu (0.weight)", "meta (extra)"],
        ),
        (with_value(torch.nan), None, DataError, ["NaN or infinite values in 2.bias"]),
        (with_value(-torch.inf), None, DataError, ["2.bias"]),
    ],
)
def test_unusable_parameters_are_named(change: Callable[[Any], Any], params: Any, error: type[Exception], texts: list[str]) -> None:
    with pytest.raises(error) as caught:
        ParameterSpace.of(change(mlp()), params, who="GGN")
    assert str(caught.value).startswith("GGN: expected ")
    for text in texts:
        assert text in str(caught.value)


def test_a_bad_parameter_that_is_not_selected_does_no_harm() -> None:
    assert ParameterSpace.of(with_value(torch.nan)(mlp()), "0.*").num_parameters == 16


ZEROS = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}


def zeros(**changes: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in ZEROS.items()}
    tensors.update({name.replace("_", "."): value for name, value in changes.items()})
    return {name: value for name, value in tensors.items() if value is not Ellipsis}


@pytest.mark.parametrize(
    ("tensors", "error", "texts"),
    [
        (zeros(**{"2_bias": ...}), ShapeError, ["without 2.bias"]),
        (zeros(extra=torch.zeros(1)), ShapeError, ["with unknown extra"]),
        (zeros(extra=torch.zeros(1), **{"0_bias": ...}), ShapeError, ["without 0.bias; with unknown extra"]),
        (zeros(**{"2_weight": torch.zeros(4, 2).double()}), ShapeError, ["2.weight [4, 2] instead of [2, 4]"]),
        (zeros(**{"2_bias": torch.zeros(5, 2).double()}), ShapeError, ["2.bias [5, 2] instead of [2]"]),
        (
            zeros(**{"0_bias": torch.zeros(()).double(), "2_bias": torch.zeros(3).double()}),
            ShapeError,
            ["0.bias [] instead of [4], 2.bias [3]"],
        ),
        (list(zeros().values())[:3], ShapeError, ["expected 4 tensors", "got 3"]),
        (zeros(**{"0_bias": None}), DTypeError, ["a tensor for 0.bias, got NoneType"]),
        (zeros(**{"0_bias": torch.zeros(4)}), DTypeError, ["0.bias of dtype torch.float64, got torch.float32"]),
        (zeros(**{"0_bias": torch.zeros(4, device="meta").double()}), DeviceError, ["0.bias on cpu, got meta"]),
        (torch.zeros(26), DTypeError, ["a list of tensors in order or a dict", "got Tensor"]),
        (iter(zeros().values()), DTypeError, ["a list of tensors in order or a dict"]),
    ],
)
def test_flatten_names_what_does_not_fit(tensors: Any, error: type[Exception], texts: list[str]) -> None:
    with pytest.raises(error) as caught:
        ParameterSpace.of(mlp()).flatten(tensors)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("shape", [(25,), (26, 3), ()])
def test_unflatten_checks_the_last_axis(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"P = 26, got .*; parameters: 0.weight \(12\)"):
        ParameterSpace.of(mlp()).unflatten(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda m: m[:1], ArgumentError, "without 2.weight, 2.bias"),
        (lambda m: m.float(), DTypeError, "torch.float64, got torch.float32"),
        (with_value(torch.inf), DataError, "infinite values in 2.bias"),
        (lambda m: nn.Sequential(nn.Linear(3, 5), m[1], m[2]).double(), ShapeError, "0.weight .5, 3. instead of .4, 3."),
    ],
)
def test_values_of_a_model_that_changed(change: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    model = mlp()
    space = ParameterSpace.of(model)
    with pytest.raises(error, match=text):
        space.values(change(model))


def test_the_model_is_not_touched() -> None:
    model = mlp()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    space = ParameterSpace.of(model, "0.*")
    space.unflatten(space.values(model))["0.weight"].zero_()
    assert all(torch.equal(before[name], p) and p.requires_grad and p.grad is None for name, p in model.named_parameters())
