"""
Learning the weights of examples
================================

Algorithm 1 with differentiable meta-parameters: every training example has a weight in its loss,
and each step's meta-gradient moves the weights so that the step makes the next loss smaller. 40 %
of the training labels of these real handwritten digits are wrong; the next loss is that of a small
clean set. ``MetaGradientUpdater`` re-uses the clean step's own gradient, which updates the model
too.
"""

# %%
# 500 digits to train on, 200 of them with another digit's label; 100 clean ones; the rest to test.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from ola_augment import MetaGradientUpdater

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
images = (torch.from_numpy(digits.images).float().flatten(1) / 16)[order]
labels = torch.from_numpy(digits.target).long()[order]
wrong = torch.arange(500) < 200
labels[:200] = (labels[:200] + torch.randint(1, 10, (200,))) % 10
clean, test = slice(500, 600), slice(600, None)


# %%
# The same pairs of steps, enough of them to memorise wrong labels, with equal and with learned
# weights.
def train(learn: bool) -> tuple[float, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    phi = torch.zeros(500, requires_grad=True)  # before the sigmoid
    meta = MetaGradientUpdater(model, [phi], inner_lr=0.1)
    for _ in range(2000):
        optimizer.zero_grad()
        chosen = torch.randint(500, (64,))
        losses = cross_entropy(meta.forward(images[chosen]), labels[chosen], reduction="none")
        meta.backward((2 * phi[chosen].sigmoid() * losses).mean())
        optimizer.step()
        optimizer.zero_grad()
        cross_entropy(model(images[clean]), labels[clean]).backward()
        if learn:
            meta.step()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((model(images[test]).argmax(1) == labels[test]).float().mean())
    return accuracy, phi.detach().sigmoid()


equal_accuracy, _ = train(learn=False)
learned_accuracy, weights = train(learn=True)
area = float(roc_auc_score(wrong.numpy(), -weights.numpy()))
print(f"test accuracy: equal weights {equal_accuracy:.3f}, learned weights {learned_accuracy:.3f}")
print(f"wrong labels ranked by weight: ROC AUC {area:.3f}")

# %%
# The weights that were learned.
figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
axes.hist([weights[~wrong], weights[wrong]], bins=20, label=["right label", "wrong label"])
axes.set(xlabel="weight", ylabel="examples")
axes.legend()
plt.show()
