"""
Augmentation that is learned while the model trains
===================================================

A classifier of handwritten digits trains while its augmentation learns which operations help: the
loop written out, then the policy over time.
"""

# %%
# 1,797 real digits of 8x8 pixels, up-sampled; 300 of them to train on.
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ola_augment import GARUpdater, GradientAlignment, OLAAugment
from ola_augment.plots import augmented_samples, policy_over_time, policy_tables
from ola_augment.training import policy_metrics

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float()[:300, None] * (255 / 16)
images = F.interpolate(images, size=(16, 16), mode="bilinear").to(torch.uint8)
labels = torch.from_numpy(digits.target).long()[:300]

# %%
# The loop: an augmented batch, then a plain one. The gradient on the plain batch trains the model
# as any other, and tells which augmentations of the batch before pointed the same way.
model = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2, padding=2),
    nn.GroupNorm(4, 16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 16, 10),
)
augment = OLAAugment("wide_long")
engine = GradientAlignment(model)
updater = GARUpdater(augment.policy, lr=0.03)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

history = []
for pair in range(240):
    augmented, plain = torch.randint(300, (2, 64))
    batch, actions = augment.augment(images[augmented])
    optimizer.zero_grad()
    with engine.capture():
        F.cross_entropy(model(batch / 255), labels[augmented]).backward()
    optimizer.step()

    optimizer.zero_grad()
    F.cross_entropy(model(images[plain] / 255), labels[plain]).backward()
    updater.step(actions, engine.align())
    optimizer.step()
    if pair % 10 == 9:
        history.append({"epoch": pair + 1, **policy_metrics(augment.policy)})

# %%
# How the policy moved. (The horizontal axis counts pairs of steps.)
figure = policy_over_time(history, augment.space)

# %%
# What it was at the start and what it is now, as pictures and as text.
figure = policy_tables({"start": OLAAugment().policy, "now": augment.policy})
print(augment.policy.summary(16, 16))

# %%
# What it draws now.
names = [str(int(label)) for label in labels[:3]]
figure = augmented_samples(augment, images[:3], labels=names)
