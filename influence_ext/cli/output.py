"""What every command shares: exit statuses, JSON on stdout or text for people, and plain tables."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses: done; a check, a solve or a training failed; the command was not understood or its input unusable; Ctrl-C."""


def emit(result: dict[str, Any]) -> None:
    """Print ``result`` as one JSON document on stdout; NaN and infinity become null, which every JSON reader takes."""
    print(json.dumps(plain(result), indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """Tensors, tuples and NaN as what JSON knows."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def aligned(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows of cells as columns, the first left-aligned and the others right-aligned."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def complain(command: str, message: str) -> None:
    """One line on stderr; a message that already begins with the command's name says it once."""
    print(f"influence-ext {command}: {message.removeprefix(command + ': ')}", file=sys.stderr)


DTYPES = {"float32": torch.float32, "float64": torch.float64}
