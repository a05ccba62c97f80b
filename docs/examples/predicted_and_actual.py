"""Influence against what it predicts (the PBRF) and what it is often taken for (retraining), test loss by test loss."""

import digits
import matplotlib.pyplot as plt
import torch

import influence_ext as ie

DAMPING = 1e-2
REMOVED = [[i] for i in range(5, 205, 20)]  # ten training examples, none with a wrong label

data = digits.load(num_train=300, num_test=60)
run = digits.train(data, hidden=16, epochs=20)
decomposition = ie.decompose(run, remove=REMOVED, damping=DAMPING)
correlations = decomposition.correlations(data.test)

influence = ie.Influence(run.model, run.recipe.loss, data.train, damping=DAMPING + digits.WEIGHT_DECAY)
removed = [i for (i,) in REMOVED]
predicted = influence.scores(data.test).values[:, removed].T.flatten()
assert decomposition.responses is not None
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.3))
for axis, kind in zip(axes, ("pbrf", "warm_start", "cold_start"), strict=True):
    actual = torch.cat([responses[kind].loss_change(data.test) for responses in decomposition.responses])
    axis.scatter(predicted, actual, s=5, alpha=0.5)
    axis.axline((0, 0), slope=1, color="k", linewidth=0.5)
    reach = 1.1 * max(float(predicted.abs().max()), float(actual.abs().quantile(0.98)))
    axis.set_xlim(-1.1 * float(predicted.abs().max()), 1.1 * float(predicted.abs().max()))
    axis.set_ylim(-reach, reach)
    axis.set_title(f"{kind.replace('_', ' ')}: Spearman {correlations[kind].spearman:.2f}", fontsize=9)
    axis.set_xlabel("influence score")
    print(f"{kind}: {correlations[kind]}")
axes[0].set_ylabel("rise of the test loss")
figure.tight_layout()
figure.savefig(digits.picture_path(), dpi=120)
