"""LiSSA, conjugate gradients and the exact solve: the error of scores against products spent, and LiSSA with too small a scale."""

import digits
import matplotlib.pyplot as plt
import torch
from torch import nn

import influence_ext as ie

DAMPING = 1e-2

data = digits.load(num_train=300, num_test=10, dtype=torch.float64)
run = digits.train(data, hidden=16)
G = ie.GGN(run.model, nn.CrossEntropyLoss(), data.train, damping=DAMPING + digits.WEIGHT_DECAY)
gradients = torch.stack(
    [
        torch.cat([g.flatten(1) for g in ie.per_example_grads(run.model, nn.CrossEntropyLoss(), data.test).values()], dim=1)[t]
        for t in range(len(data.y_test))
    ]
)
exact = ie.solvers.Direct().solve(G, gradients).value
top = ie.solvers.top_eigenvalue(G)


def error(X: torch.Tensor) -> float:
    """Relative, over all right-hand sides."""
    return float((X - exact).norm() / exact.norm())


steps = [4, 8, 16, 32, 64, 128, 256, 512, 1024]
curves = {
    "CG": lambda T: ie.solvers.CG(rtol=None, max_steps=T),
    "LiSSA, scale 1.25 x top eigenvalue (automatic)": lambda T: ie.solvers.LiSSA(num_steps=T),
    "LiSSA, scale 10 x top eigenvalue": lambda T: ie.solvers.LiSSA(num_steps=T, scale=10 * top),
}
figure, axis = plt.subplots(figsize=(5.5, 3.6))
for name, make in curves.items():
    errors = [error(make(T).solve(G, gradients).value) for T in steps]
    axis.loglog(steps, errors, marker=".", label=name)
    print(f"{name}: error {errors[-1]:.1e} after {steps[-1]} products")
axis.set_xlabel("products a right-hand side")
axis.set_ylabel("relative error of (G + λI)⁻¹ v")
axis.legend(fontsize=7)
figure.tight_layout()
figure.savefig(digits.picture_path(), dpi=120)

try:
    ie.solvers.LiSSA(num_steps=1000, scale=0.25 * top).solve(G, gradients)
except ie.errors.SolverFailure as failure:
    print(f"scale = a quarter of the top eigenvalue: {failure}")
