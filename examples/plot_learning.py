"""
Augmentation that is measured while the model trains
====================================================

A classifier of upright handwritten digits is to be used on rotated ones, 64 labelled images of
which are given. The loop written out, what was found, and the policy over time.
"""

# %%
# 1,797 real digits of 8x8 pixels, up-sampled; 300 of them to train on. The target domain: rotated
# by up to 60 degrees.
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from ola_augment import OLAAugment, OLALearner
from ola_augment.plots import augmented_samples, policy_over_time, policy_tables
from ola_augment.training import policy_metrics

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float()[:364, None] * (255 / 16)
images = F.interpolate(images, size=(16, 16), mode="bilinear").to(torch.uint8)
labels = torch.from_numpy(digits.target).long()[:364]
rotate = v2.RandomRotation(60, interpolation=v2.InterpolationMode.BILINEAR)
target = torch.stack([rotate(image) for image in images[300:]])
images, target_labels, labels = images[:300], labels[300:], labels[:300]

# %%
# One body for both kinds of batches: every other one is augmented. In a sixth of the run the
# gradients of augmented images are compared with those of the target domain; then what was found is
# tried, and used if it helps.
model = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2, padding=2),
    nn.GroupNorm(4, 16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 16, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
pairs = 500
augment = OLAAugment(strength=1)
learner = OLALearner.recommended(model, augment, [(target, target_labels)], pairs)

history = []
for index in range(2 * pairs):
    chosen = torch.randint(300, (64,))
    with learner.step(images[chosen]) as step:
        F.cross_entropy(model(step.images / 255), labels[chosen]).backward()
    optimizer.step()
    optimizer.zero_grad()
    if index % 20 == 19:
        history.append({"epoch": learner.pairs, **policy_metrics(augment.policy)})

# %%
# What was found, and how sure that is.
print(learner.evidence())

# %%
# How the policy moved. (The horizontal axis counts pairs of steps.)
figure = policy_over_time(history, augment.space)

# %%
# What it was at the start and what it is now, as pictures and as text.
figure = policy_tables({"start": OLAAugment(strength=1).policy, "now": augment.policy})
print(augment.policy.summary(16, 16))

# %%
# What it draws now.
names = [str(int(label)) for label in labels[:3]]
figure = augmented_samples(augment, images[:3], labels=names)
