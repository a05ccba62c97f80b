"""How many wrong labels are found by inspecting the training examples of largest self-influence first."""

import digits
import matplotlib.pyplot as plt
import torch
from torch import nn

import influence_ext as ie

DAMPING = 1e-2

data = digits.load()
run = digits.train(data)
loss = nn.CrossEntropyLoss()
influence = ie.Influence(run.model, loss, data.train, damping=DAMPING + digits.WEIGHT_DECAY)
with torch.no_grad():
    losses = nn.functional.cross_entropy(run.model(data.X), data.y, reduction="none")
rankings = {
    "self-influence": influence.self_influence(),
    "gradient norm": ie.per_example_norms(run.model, loss, data.train),
    "training loss": losses,
}

is_wrong = torch.zeros(len(data.y)).index_fill_(0, data.wrong, 1.0)
inspected = torch.arange(1, len(data.y) + 1) / len(data.y)
figure, axis = plt.subplots(figsize=(5, 3.4))
for name, values in rankings.items():
    found = is_wrong[values.argsort(descending=True)].cumsum(0) / is_wrong.sum()
    axis.plot(100 * inspected, 100 * found, label=name)
    print(f"{name}: {100 * float(found[len(found) // 5]):.0f} % of the wrong labels within the first 20 % inspected")
axis.plot([0, 100], [0, 100], "k:", label="by chance")
axis.set_xlabel("training examples inspected (%)")
axis.set_ylabel("wrong labels found (%)")
axis.legend()
figure.tight_layout()
figure.savefig(digits.picture_path(), dpi=120)
