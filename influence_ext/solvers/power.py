"""The top eigenvalue by power iteration."""

from __future__ import annotations

import torch

from influence_ext.errors import ArgumentError
from influence_ext.operators.base import LinearOperator


def top_eigenvalue(operator: LinearOperator, num_steps: int = 20, seed: int = 0) -> float:
    """Estimate the largest eigenvalue in magnitude, from below.

    From a random unit vector, ``x ← A x / ‖A x‖``; the estimate is the last ``‖A x‖``. It never falls from step to
    step and after k steps is at least ``|c|^(1/k)`` of the top eigenvalue, where c is the start's component along the
    top eigenvector, typically ``1/√P``: 20 steps then give 70 % of it or more for a million parameters, and in
    practice far more, because the top eigenvalues of curvature matrices stand alone.

    Args:
        operator: ``A``, symmetric.
        num_steps: Products to spend.
        seed: Of the random start; the global random state is neither read nor changed.

    Returns:
        A lower bound up to rounding; 0 for the zero matrix, NaN or infinity if a product was not finite.

    Raises:
        ArgumentError: ``num_steps`` is below 1.

    Cost: ``num_steps`` products, two vectors of memory, one host synchronisation.

    Reference: Kuczyński and Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with
    a random start", SIAM J. Matrix Anal. Appl. 13 (1992).
    """
    if num_steps < 1:
        raise ArgumentError(f"top_eigenvalue: expected num_steps of at least 1, got {num_steps}.")
    # drawn on the CPU so that every device starts from the same vector
    start = torch.randn(1, operator.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(int(seed)))
    x = (start / start.norm()).to(dtype=operator.dtype, device=operator.device)
    tiny = torch.finfo(operator.dtype).tiny
    growth = x.new_zeros(())
    for _ in range(num_steps):
        x = operator.matmat(x).detach()
        growth = torch.linalg.vector_norm(x)
        x = x / growth.clamp_min(tiny)
    return float(growth)
