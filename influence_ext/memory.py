"""What is kept of freed CPU memory, so that the next result does not pay for fresh pages. On a device torch's own cache does that."""

from __future__ import annotations

import operator

import influence_ext._C as _C
from influence_ext.errors import ArgumentError

__all__ = ["empty_cache", "set_cache_limit"]


def empty_cache() -> None:
    """Hand the freed CPU memory that is kept for the next results back to the system.

    Results of 128 KiB or more (per-example gradients, products of large models) and the states of tapes lie in blocks. When the last tensor
    in a block is freed, the block is kept, and a later request of 4/5 of its size or more is served from it: touching fresh memory takes
    several times as long as writing gradients to it. Blocks that tensors still lie in are never touched. What is kept counts as this
    process's memory; ``build_info()["cache_bytes"]`` says how much it is, ``build_info()["cache_limit"]`` how much it may be. When the
    system has no memory for a request of this library, the cache is emptied before the request fails; for requests of others, torch's
    included, only this function empties it.
    """
    _C.empty_cache()


def set_cache_limit(bytes: int) -> None:
    """Bound the freed CPU memory that is kept (:func:`empty_cache`); what is beyond it goes back at once, the oldest first.

    Args:
        bytes: 0 keeps nothing. At start it is ``INFLUENCE_EXT_CACHE_LIMIT``, else 1 GiB or a sixteenth of the memory that this process may
            use (of the machine, or of its control group), whichever is less. A result larger than the limit is never kept.

    Raises:
        ArgumentError: not a whole number of 0 or more.
    """
    try:
        wanted = operator.index(bytes)
    except TypeError:
        wanted = -1
    if not 0 <= wanted < 2**63:
        raise ArgumentError(f"set_cache_limit: expected a number of bytes, 0 or more, got {bytes!r}; 0 keeps nothing.")
    _C.set_cache_limit(wanted)
