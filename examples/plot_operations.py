"""
The operations of a search space
================================

Every image of a batch gets its own operations. Here a transform over one operation at a time shows
what WideLong does to a photograph at growing magnitudes.
"""

# %%
# A photograph, as a uint8 batch of one.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image

from ola_augment import OLAAugment, SearchSpace

photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None]
photograph = photograph[:, :, 100:356:2, 200:456:2].contiguous()

# %%
# The table of the space: what each magnitude bin means.
space = SearchSpace.wide_long()
print(space)

# %%
# Actions are plain tensors, so they can be written by hand and replayed.
augment = OLAAugment(space, max_ops=1)
bins = (0, 10, 20, 30)
figure, grid = plt.subplots(len(space), len(bins), figsize=(6, 1.5 * len(space)))
actions = augment.policy.sample(1)
actions.keep[:] = True
for index, (operation, row) in enumerate(zip(space.operations, grid, strict=True)):
    for magnitude_bin, axes in zip(bins, row, strict=True):
        actions.ops[:] = index
        actions.magnitude_bins[:] = magnitude_bin
        actions.centers[:] = 0.5
        axes.imshow(augment.replay(photograph, actions)[0].permute(1, 2, 0).numpy())
        axes.set_axis_off()
    row[0].set_title(operation.name, fontsize=9, loc="left")
figure.tight_layout()
plt.show()
