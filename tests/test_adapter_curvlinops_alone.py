"""The curvlinops adapter where curvlinops is not installed."""

from __future__ import annotations

import subprocess
import sys

WITHOUT = """
import sys
sys.modules["curvlinops"] = None  # as if it were not installed
import numpy as np, torch
from torch import nn
from influence_ext.adapters import curvlinops as adapter
assert adapter.PyTorchLinearOperator.__module__ == "influence_ext.adapters.curvlinops.standin"
torch.manual_seed(0)
model, loss = nn.Linear(3, 2).double(), nn.MSELoss()
X, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
params = list(model.parameters())[::-1]
G = adapter.GGNLinearOperator(model, loss, params, [(X, y)])
A = torch.cat([torch.ones(6, 1).double(), X], 1)
gram = A.T @ A / 6
D = torch.zeros(8, 8).double()
for o in range(2):
    place = [o] + [2 + 3 * o + i for i in range(3)]
    D[torch.tensor(place)[:, None], torch.tensor(place)] = gram
V = torch.randn(8, 3).double()
pieces = [V[:2], V[2:].reshape(2, 3, 3)]
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
close(G @ V, D @ V); close(G @ V[:, 0], D @ V[:, 0])
close(torch.cat([x.reshape(-1, 3) for x in G @ pieces]), D @ V)
close(torch.cat([x.reshape(-1) for x in G @ [p[..., 0] for p in pieces]]), D @ V[:, 0])
S = G + 0.1 * adapter.IdentityLinearOperator([p.shape for p in params], G.device, G.dtype)
E = D + 0.1 * torch.eye(8).double()
close(S @ V, E @ V); close((S @ S - 2 * S) @ V, E @ E @ V - 2 * E @ V); close((S @ S).adjoint() @ V, E @ E @ V)
close(adapter.CGInverseLinearOperator(S, tolerance=1e-12) @ V, torch.linalg.solve(E, V))
close(adapter.NeumannInverseLinearOperator(S, num_terms=2000, scale=0.3) @ V, torch.linalg.solve(E, V))
close(torch.as_tensor(S.to_scipy() @ V.numpy()), E @ V); close(torch.as_tensor(S.to_scipy().T @ V[:, 0].numpy()), E @ V[:, 0])
for wrong in (V[:3], [V], "a", [V[:2], V[2:]]):
    try:
        S @ wrong
    except ValueError:
        continue
    raise AssertionError(wrong)
flat = adapter.IdentityLinearOperator([(8,)], G.device, G.dtype)
for make in (lambda: S + flat, lambda: S @ flat):
    try:
        make()
    except ValueError:
        continue
    raise AssertionError
print("right")
"""


def test_without_curvlinops() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout.strip() == "right", run.stderr
