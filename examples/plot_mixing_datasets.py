"""
Mixing data sets of different quality
=====================================

Two sources of handwritten digits: one is clean, of the other every image was scanned at 4x4 pixels
and half the labels were typed in wrong. A SplitPolicy learns during training how much to draw from
each. As a batch sampler it works with any DataLoader.
"""

# %%
# 600 clean digits and 600 poor ones; the rest is for testing.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import GARUpdater, GradientAlignment, SplitBatchSampler, SplitPolicy

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 16
labels = torch.from_numpy(digits.target).long()
poor = slice(600, 1200)
images[poor] = interpolate(avg_pool2d(images[poor], 2), scale_factor=2)
typo = torch.rand(600) < 0.5
labels[poor][typo] = torch.randint(10, (int(typo.sum()),))
data = TensorDataset(torch.arange(1200), images[:1200], labels[:1200])


# %%
# The policy draws the split of each example; every step is rewarded by the next step's gradient.
# Each step is captured while its gradient rewards the step before, so two engines take turns.
def train(learn):
    torch.manual_seed(1)
    policy = SplitPolicy(2, inverted=False)
    sampler = SplitBatchSampler(policy, [range(600), range(600, 1200)], 64, num_batches=200)
    updater = GARUpdater(policy, lr=0.05)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    engine, previous = GradientAlignment(model), GradientAlignment(model)
    actions, shares = None, []
    for indices, x, y in DataLoader(data, batch_sampler=sampler):
        drawn = sampler.actions(indices)
        optimizer.zero_grad()
        with engine.capture():
            cross_entropy(model(x), y).backward()
        if actions is not None:
            alignments = previous.align()
            if learn:
                updater.step(actions, alignments)
        optimizer.step()
        actions, engine, previous = drawn, previous, engine
        shares.append(policy.usage())
    with torch.no_grad():
        accuracy = (model(images[1200:]).argmax(1) == labels[1200:]).float().mean()
    return torch.stack(shares), float(accuracy)


# %%
# The share of clean digits grows, and so does the accuracy on clean test digits. Stop before the
# network has memorised the clean digits: it then has nothing left to learn from them, and the
# gradients of typing errors are all that the rewards can see.
half, plain_accuracy = train(learn=False)
shares, learned_accuracy = train(learn=True)
print(f"half and half: test accuracy {plain_accuracy:.3f}")
print(f"learned: {shares[-1, 0]:.2f} clean at the end, test accuracy {learned_accuracy:.3f}")
figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
axes.plot(shares.numpy(), label=["clean", "poor"])
axes.set(xlabel="step", ylabel="share of the batch", ylim=(0, 1))
axes.legend()
plt.show()
