"""
Finding mislabelled examples
============================

An example whose gradient keeps pointing away from the next batch's gradient is suspicious. Here
15 % of the labels of real handwritten digits are wrong, and the running mean of each example's
alignment (normalised in its batch, as rewards are) ranks them, beside the usual ranking by the
running mean of the loss. The most negative alignments are wrong labels far more often than chance,
but the loss is the better detector: wrong examples pull in all directions, and some of those agree.
"""

# %%
# 1,200 digits; 180 labels replaced by another digit.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from ola_augment import GradientAlignment
from ola_augment.training import gradient_alignment_reward

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images[:1200]).float().flatten(1) / 16
labels = torch.from_numpy(digits.target[:1200]).long()
wrong = torch.zeros(1200, dtype=torch.bool)
wrong[torch.randperm(1200)[:180]] = True
labels[wrong] = (labels[wrong] + torch.randint(1, 10, (180,))) % 10

# %%
# Pairs of steps, as always: the second step's gradient is the reference for the first's examples.
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
engine = GradientAlignment(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
alignment_sum, loss_sum, visits = torch.zeros(3, 1200)
for _ in range(160):
    first, second = torch.randint(1200, (2, 64))
    optimizer.zero_grad()
    with engine.capture():
        losses = cross_entropy(model(images[first]), labels[first], reduction="none")
        losses.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    cross_entropy(model(images[second]), labels[second]).backward()
    alignments = engine.align()
    optimizer.step()
    alignment_sum.index_add_(0, first, gradient_alignment_reward(alignments))
    loss_sum.index_add_(0, first, losses.detach())
    visits.index_add_(0, first, torch.ones(64))

# %%
# Precision and recall if the 180 most suspicious examples are called wrong.
scores = {"alignment": -alignment_sum / visits.clamp(min=1), "loss": loss_sum / visits.clamp(min=1)}
found, areas = {}, {}
figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
for name, score in scores.items():
    called = score.argsort(descending=True)[:180]
    found[name] = float(wrong[called].float().mean())
    areas[name] = float(roc_auc_score(wrong.numpy(), score.numpy()))
    precision, recall, _ = precision_recall_curve(wrong.numpy(), score.numpy())
    axes.plot(recall, precision, label=name)
    print(f"{name:9}: precision = recall = {found[name]:.3f} at 180, ROC AUC {areas[name]:.3f}")
axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02))
axes.legend()
plt.show()
