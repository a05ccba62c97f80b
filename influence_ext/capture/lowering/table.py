"""What the modules of this package share: the type of a lowering, and ways to write a table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from influence_ext.capture.context import Context, Value

Lowering = Callable[[Context, fx.Node], Value | None]


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of an operator, given by position or by name or not at all."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def named(lowering: Lowering, operators: str) -> dict[str, Lowering]:
    """One lowering for several ATen operators, separated by spaces."""
    return {f"aten.{name}": lowering for name in operators.split()}
