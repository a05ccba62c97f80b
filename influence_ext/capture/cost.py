"""How much arithmetic a node of an exported graph does: what the report weighs native against generic rules by."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

_PRODUCTS = frozenset(f"aten.{name}.default" for name in ("linear", "matmul", "mm", "mv", "bmm", "addmm", "baddbmm", "addbmm"))
_RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn_")


def operations(node: fx.Node, width: int) -> float:
    """Multiplications and additions of the forward pass for one example; everything that is no product counts one for an element.

    Args:
        node: ``call_function``.
        width: elements of its output for one example.
    """
    target = str(node.target)
    shapes = [_shape(n) for n in node.all_input_nodes]
    if target in _PRODUCTS:
        left: Any = node.args[1] if "addmm" in target or "addbmm" in target or "baddbmm" in target else node.args[0]
        return 2.0 * width * float(left.meta["val"].shape[-1])
    if target == "aten.bilinear.default":
        bilinear: Any = node.args[2]
        return 2.0 * width * math.prod(_shape(bilinear)[1:])
    if "conv" in target:
        weight: Any = node.args[1]
        size = _shape(weight)
        if "transpose" in target or (len(node.args) > 6 and node.args[6] is True):
            source: Any = node.args[0]
            batch, spatial = elements(source), math.prod(size[1:])
            return 2.0 * batch * spatial
        return 2.0 * width * math.prod(size[1:])
    if "scaled_dot_product" in target:
        q, k = node.args[0], node.args[1]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        return 2.0 * (elements(q) + width) * _shape(k)[-2]
    if target == "aten.einsum.default":
        equation, operands = node.args[0], node.args[1]
        assert isinstance(equation, str)
        assert isinstance(operands, (list, tuple))
        sizes: dict[str, int] = {}
        for letters, operand in zip(equation.split("->")[0].replace(" ", "").split(","), operands, strict=True):
            assert isinstance(operand, fx.Node)
            sizes.update(zip(letters.replace("...", ""), _shape(operand), strict=False))
        return 2.0 * math.prod(sizes.values())
    if target.startswith(_RECURRENT):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        steps = max(_shape(source)[:-1])
        return 2.0 * steps * sum(math.prod(s) for s in shapes if len(s) == 2)
    return float(max([width, *(elements(n) for n in node.all_input_nodes if _is_free(n))]))


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Sizes of a tensor, 1 in place of the number of examples."""
    value = node.meta.get("val")
    return tuple(size if isinstance(size, int) else 1 for size in value.shape) if isinstance(value, Tensor) else ()


def elements(node: fx.Node) -> int:
    """Of a tensor, for one example; 0 for an operator with several outputs."""
    if not isinstance(node.meta.get("val"), Tensor):
        return 0
    return math.prod(_shape(node))


def _is_free(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(not isinstance(size, int) for size in value.shape)
