"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from influence_ext.errors import ArgumentError


def check_path(path: Any, who: str) -> Path:
    """Where to write or read.

    Raises:
        ArgumentError: not a path, or an empty one.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        found = repr(path) if isinstance(path, (str, bytes)) else type(path).__name__
        raise ArgumentError(f"{who}: expected a path, got {found}; pass a str or a pathlib.Path.")
    return Path(path)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file to write, which takes the place of ``path`` at the end and is removed on failure.

    Folders that are missing are made; a symbolic link stays one, and what it leads to is replaced. Several writers at once each have a file
    of their own, and the last to end stays.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.partial")
    partial.touch(exist_ok=False)  # unlike the files of tempfile, with the permissions that new files are given
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
