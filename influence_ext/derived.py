"""Tensors that a network computes from its parameters alone: normalised weights, masks times weights, low-rank updates.

The executor differentiates with respect to slots. A slot that is a parameter as it lies in memory needs nothing more; slots φ(θ) that are
computed from trained parameters become blocks of their own behind the parameters, θ̃ = (θ, φ(θ)), and products go through the chain rule:

    J v = J̃ D v,   Jᵀ g = Dᵀ J̃ᵀ g,   D = ∂θ̃/∂θ = [I; ∂φ/∂θ]

D costs what φ costs, whatever the number of examples, for the parameters that φ reads; others pass through. Second derivatives have a term
more, since φ is curved itself:

    ∇²L v = Dᵀ ∇̃²L D v + Σ_j (∇̃L)_j ∇²φ_j v
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_ext.capture import Slot
from influence_ext.capture.generic import Operator
from influence_ext.params import ParameterSpace


@dataclass(frozen=True, eq=False)
class DerivedParameters:
    """The derived slots of a graph that depend on trained parameters.

    Attributes:
        space: the trained parameters.
        slots: index of a slot -> the slot.
        offsets: index of a slot -> its place in θ̃.
        num_parameters: length of θ̃.
        read: places in ``space`` of the parameters that the slots are computed from.
    """

    space: ParameterSpace
    slots: dict[int, Slot]
    offsets: dict[int, int]
    num_parameters: int
    read: tuple[int, ...]

    @classmethod
    def of(cls, slots: Sequence[Slot], space: ParameterSpace) -> DerivedParameters | None:
        """None if no slot is computed from trained parameters."""
        trained = set(space.names) | set(space.aliases)
        found = {i: s for i, s in enumerate(slots) if s.expression is not None and not trained.isdisjoint(s.expression.names())}
        if not found:
            return None
        offsets, total = {}, space.num_parameters
        for index, slot in found.items():
            offsets[index] = total
            total += math.prod(slot.shape)
        names = frozenset[str]().union(*(slot.names() for slot in found.values()))
        read = {space.aliases.get(name, name) for name in names}
        return cls(space, found, offsets, total, tuple(k for k, name in enumerate(space.names) if name in read))

    def at(self, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> DerivedPoint:
        """φ at given values of the trained parameters; everything else is read from ``tensors`` (name -> tensor)."""
        operator = _Derivation(self, {name: t.detach() for name, t in tensors.items()})
        theta = [parameters[self.space.names[k]].reshape(-1) for k in self.read]
        flat = operator.forward(1, [], theta)[0]
        sizes = [math.prod(slot.shape) for slot in self.slots.values()]
        values = dict(zip(self.slots, flat.split(sizes), strict=True))
        return DerivedPoint(self, operator, theta, {i: v.contiguous() for i, v in values.items()})


@dataclass(frozen=True, eq=False)
class DerivedPoint:
    """φ and its derivative at one θ.

    Attributes:
        theta: the parameters that are read, flat.
        values: index of a slot -> its value, flat.
    """

    parameters: DerivedParameters
    operator: Operator
    theta: list[Tensor]
    values: dict[int, Tensor]

    def push(self, V: Tensor) -> Tensor:
        """``D v``: ``[V, P] -> [V, P̃]``."""
        if V.shape[0] == 0:
            return V.new_empty(0, self.parameters.num_parameters)
        tangents = self.operator.jvp(1, [], self.theta, [], self._split(V))
        return torch.cat([V, tangents.reshape(V.shape[0], -1)], dim=1)

    def pull(self, G: Tensor) -> Tensor:
        """``Dᵀ g``: ``[V, P̃] -> [V, P]``, in the memory of ``G`` where that is one vector."""
        P = self.parameters.space.num_parameters
        total, derived = G[:, :P].contiguous(), G[:, P:]
        if len(G) > 0:
            found = self.operator.vjp(1, [], self.theta, derived.reshape(len(G), 1, -1), [True] * len(self.theta))
            self._add(found, total)
        return total

    def second_order(self, gradient: Tensor, V: Tensor) -> Tensor:
        """``Σ_j g_j ∇²φ_j v`` for a gradient ``[P̃]`` in θ̃: ``[V, P] -> [V, P]``."""
        g = gradient[None, self.parameters.space.num_parameters :]
        found = self.operator.second_order(1, [], self.theta, g, [], self._split(V), [True] * len(self.theta))
        total = torch.zeros_like(V)
        self._add(found, total)
        return total

    def _blocks(self, V: Tensor) -> list[Tensor]:
        """Of ``[V, P]``, the columns of each parameter that is read."""
        space = self.parameters.space
        return [V[:, space.offsets[k] : space.offsets[k] + space.sizes[k]] for k in self.parameters.read]

    def _split(self, V: Tensor) -> list[Tensor | None]:
        return list(self._blocks(V))

    def _add(self, found: Sequence[Tensor | None], total: Tensor) -> None:
        for block, term in zip(self._blocks(total), found, strict=True):
            if term is not None:
                block += term.reshape(len(total), -1)


class _Derivation(Operator):
    """θ -> φ(θ), all derived slots in one row."""

    def __init__(self, derived: DerivedParameters, tensors: Mapping[str, Tensor]):
        super().__init__("derived parameters")
        self._derived, self._tensors = derived, tensors

    def function(self, n: int) -> Any:
        """``f(*theta) -> [1, sum of sizes]``."""
        space, read = self._derived.space, self._derived.read

        def f(*theta: Tensor) -> Tensor:
            tensors = dict(self._tensors)
            tensors.update({space.names[k]: t.reshape(space.shapes[k]) for k, t in zip(read, theta, strict=True)})
            tensors.update({alias: tensors[name] for alias, name in space.aliases.items() if name in tensors})
            rows = [slot.expression.evaluate(tensors).reshape(-1) for slot in self._derived.slots.values() if slot.expression is not None]
            return torch.cat(rows)[None]

        return f


@dataclass(frozen=True, eq=False)
class DerivedFactors:
    """Per-example factors behind the chain rule; the same methods as native factors.

    Vectors are pushed to ``[W, P̃]``; where there are none, rows are formed in ``[N, P̃]`` and pulled back.
    """

    native: Any
    point: DerivedPoint

    def materialise(self, out: Tensor | None = None) -> Tensor:
        """``[V, N, P]``."""
        rows = self.native.materialise(None)
        pulled = self.point.pull(rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:-1], -1)
        return pulled if out is None else out.view(pulled.shape).copy_(pulled)

    def dots(self, u: Tensor) -> Tensor:
        """``[W, P] -> [V, W, N]``."""
        products: Tensor = self.native.dots(self.point.push(u))
        return products

    def square_norms(self) -> Tensor:
        """``[V, N]``."""
        return self.materialise().square().sum(dim=-1)

    def square_norms_by_region(self) -> dict[int, Tensor]:
        """Where a region of the flat vector begins, which lies within one parameter -> ``[V, N]``."""
        space = self.point.parameters.space
        blocks = self.materialise().split(space.sizes, dim=-1)
        return {offset: block.square().sum(dim=-1) for offset, block in zip(space.offsets, blocks, strict=True)}

    def square_sum(self) -> Tensor:
        """``[P]``."""
        return self.materialise().square().sum(dim=(0, 1))

    def outer_products(self) -> dict[int, Any]:
        """Offset of a parameter -> both sides of its factors, of the parameters that are read as they are."""
        P = self.point.parameters.space.num_parameters
        return {offset: uses for offset, uses in self.native.outer_products().items() if offset < P}

    def gram(self, other: Any) -> Tensor:
        """``[V·N, V'·N']``; the other factors may be of any kind."""
        mine, theirs = self.materialise(), other.materialise()
        return mine.reshape(-1, mine.shape[-1]) @ theirs.reshape(-1, theirs.shape[-1]).T
