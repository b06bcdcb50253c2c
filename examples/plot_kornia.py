"""
kornia's augmentations, learned
===============================

A search space of kornia's own augmentations, randomness and all: what was drawn is recorded and
replayed, image, mask and points stay together in kornia's container.
"""

# %%
# Four augmentations as operations, two with the parameter that becomes their magnitude. The blobs
# of ``RandomGaussianIllumination`` and the holes of ``RandomErasing`` are random: every image has
# its own.
import kornia.augmentation as K
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image

from ola_augment import OLAAugment, SearchSpace
from ola_augment.kornia import PolicyAugmentation, operation

space = SearchSpace(
    (
        operation(K.RandomRotation(45.0), 0, 45, parameter="degrees", signed=True),
        operation(K.RandomGaussianBlur((7, 7), (0.1, 3.0)), 0.1, 3.0, parameter="sigma"),
        operation(K.RandomGaussianIllumination(gain=(0.3, 0.6))),
        operation(K.RandomErasing(scale=(0.05, 0.2))),
    ),
    name="from kornia",
)
print(space)

# %%
# A photograph, a mask of its middle, and a point, in kornia's container beside a flip of its own.
photograph = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[:, 60:380:2, 120:440:2]
images = (photograph / 255).expand(6, -1, -1, -1)
masks = torch.zeros(6, 1, 160, 160)
masks[:, :, 40:120, 50:130] = 1
points = torch.tensor([[[90.0, 80.0]]]).repeat(6, 1, 1)

augment = PolicyAugmentation(OLAAugment(space, generator=torch.Generator().manual_seed(4)))
sequence = K.AugmentationSequential(
    augment, K.RandomHorizontalFlip(p=0.5), data_keys=["input", "mask", "keypoints"]
)
torch.manual_seed(0)
shown, moved, landed = sequence(images, masks, points)

figure, grid = plt.subplots(2, 3, figsize=(7, 5))
for axes, image, mask, point in zip(grid.flat, shown, moved, landed, strict=True):
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.contour(mask[0].numpy(), levels=[0.5], colors="white", linewidths=1)
    axes.plot(*point[0].tolist(), "o", color="red")
    axes.set_axis_off()
figure.tight_layout()
plt.show()

# %%
# What was drawn, with its log-probability, is what an updater learns from; applied once more it
# gives the same images.
actions = augment.last_actions
print(actions.log_prob)
again = sequence(images, masks, points, params=sequence._params)
print(all(torch.equal(*pair) for pair in zip(again, (shown, moved, landed), strict=True)))
