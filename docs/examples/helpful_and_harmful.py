"""Test digits, the training digits that help them most and those that harm them most."""

import digits
import matplotlib.pyplot as plt
from torch import nn

import influence_ext as ie

TESTS, SHOWN, DAMPING = (0, 4, 9), 4, 1e-2

data = digits.load()
run = digits.train(data)
influence = ie.Influence(run.model, nn.CrossEntropyLoss(), data.train, damping=DAMPING + digits.WEIGHT_DECAY)
scores = influence.scores(data.test)

figure, axes = plt.subplots(len(TESTS), 1 + 2 * SHOWN, figsize=(1.1 * (1 + 2 * SHOWN), 1.5 * len(TESTS)))
wrong = set(data.wrong.tolist())
for row, test in zip(axes, TESTS, strict=True):
    row[0].imshow(data.X_test[test].view(8, 8), cmap="gray_r")
    row[0].set_title(f"test: {int(data.y_test[test])}", fontsize=8, fontweight="bold")
    found = scores.top(SHOWN, test=test) + scores.top(SHOWN, test=test, harmful=True)
    for axis, (index, score) in zip(row[1:], found, strict=True):
        axis.imshow(data.X[index].view(8, 8), cmap="Greens" if score > 0 else "Reds")
        mark = " (wrong label)" if index in wrong else ""
        axis.set_title(f"{int(data.y[index])}{mark}\n{score:+.3f}", fontsize=6)
    for axis in row:
        axis.set_axis_off()
figure.tight_layout()
figure.savefig(digits.picture_path(), dpi=120)
shown = [index for test in TESTS for index, _ in scores.top(SHOWN, test=test, harmful=True)]
print(f"{sum(index in wrong for index in shown)} of the {len(shown)} most harmful training digits shown have a wrong label.")
