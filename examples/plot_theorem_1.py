"""
Theorem 1: the update of GAR points along the true meta-gradient
================================================================

A batch holds n copies of two images, and each copy is augmented in one of three ways. How many
copies get which augmentation is all that matters, so every batch can be enumerated. So the true
meta-gradient of the next step's loss, the expected update of the gradient-alignment reward (GAR),
and the variance of both estimators, GAR and next-step loss (NSLR), are exact here, in float64.
"""

# %%
# A problem small enough to enumerate: bright against dark images, one operation that is dropped or
# kept at one of two magnitudes, and a plain batch that gives the next loss.
import itertools
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from ola_augment import OLAPolicy, Operation, SearchSpace
from ola_augment.operations import apply_actions

ALPHA = 1.0
space = SearchSpace((Operation("brightness", 0.3, 2.0),), num_magnitude_bins=2)
policy = OLAPolicy(space, max_ops=1).double()
outcomes = policy.sample(3)._replace(
    keep=torch.tensor([[False], [True], [True]]), magnitude_bins=torch.tensor([[0], [0], [1]])
)

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 2)).double()
theta = {name: value.detach() for name, value in model.named_parameters()}
plain = torch.rand(64, 1, 4, 4).double()
plain_targets = (plain.mean((1, 2, 3)) > 0.5).long()


def loss(parameters, images, targets):
    return cross_entropy(functional_call(model, parameters, (images,)), targets)


def flat(gradients, *batch):
    return torch.cat([value.reshape(*batch, -1) for value in gradients.values()], -1)


def unflat(vector):
    sizes = [value.numel() for value in theta.values()]
    parts = vector.split(sizes)
    return {
        name: part.view_as(value) for (name, value), part in zip(theta.items(), parts, strict=True)
    }


# %%
# The score of each outcome (the gradient of its log-probability in all logits), and the gradient of
# each of the two images under each outcome.
log_prob = policy.log_prob(outcomes)
probs = log_prob.detach().exp()
logits = list(policy.named_logits().values())
scores = torch.stack(
    [
        torch.cat([g.flatten() for g in torch.autograd.grad(row, logits, retain_graph=True)])
        for row in log_prob
    ]
)
images = torch.stack([torch.rand(1, 4, 4) * 0.8, torch.rand(1, 4, 4) * 0.8 + 0.2]).double()
targets = torch.tensor([0, 1])
augmented = torch.stack(
    [apply_actions(image.expand(3, 1, 4, 4), space, outcomes) for image in images]
)
one = grad(lambda parameters, x, y: loss(parameters, x[None], y[None]))
per_example = flat(vmap(vmap(one, (None, 0, None)), (None, 0, 0))(theta, augmented, targets), 2, 3)


# %%
# Enumerate the batches of n images: for each, its probability, theta_{t+1}, and from these what an
# update of GAR and of NSLR would be.
def enumerate_batches(n):
    half = n // 2
    counts = [
        (i, j, half - i - j) for i in range(half + 1) for j in range(half + 1 - i)
    ]  # of one image
    counts = torch.tensor(list(itertools.product(counts, repeat=2))).double()  # (batches, 2, 3)
    log_ways = 2 * math.lgamma(half + 1) - (counts + 1).lgamma().sum((1, 2))
    batch_probs = (log_ways + (counts * probs.log()).sum((1, 2))).exp()

    moved = flat(theta) - ALPHA / n * torch.einsum("bik,ikp->bp", counts, per_example)
    next_loss = vmap(lambda vector: loss(unflat(vector), plain, plain_targets))(moved)
    next_grad = vmap(grad(lambda vector: loss(unflat(vector), plain, plain_targets)))(moved)
    alignments = torch.einsum("ikp,bp->bik", per_example, next_grad)
    # A step of length alpha / n along an example's gradient lowers the next loss by about
    # alpha / n times its alignment.
    gar = ALPHA / n * torch.einsum("bik,bik,kl->bl", counts, alignments, scores)
    nslr = -next_loss[:, None] * torch.einsum("bik,kl->bl", counts, scores)
    return batch_probs, gar, nslr


# %%
# NSLR is unbiased, so its expectation is the true meta-gradient (of minus the next loss).
print("   n  1 - cosine  variance of GAR  variance of NSLR")
sizes, cosines, ratios = [2, 4, 8, 16, 32], [], []
for n in sizes:
    batch_probs, gar, nslr = enumerate_batches(n)
    truth, expected = batch_probs @ nslr, batch_probs @ gar
    cosines.append(float(torch.cosine_similarity(truth, expected, dim=0)))
    variances = [
        float(batch_probs @ (update - batch_probs @ update).square().sum(1))
        for update in (gar, nslr)
    ]
    ratios.append(variances[1] / variances[0])
    print(f"{n:4}  {1 - cosines[-1]:10.2e}  {variances[0]:15.2e}  {variances[1]:16.2e}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.loglog(sizes, [1 - cosine for cosine in cosines], "o-")
left.set(xlabel="images n", title="1 - cosine(expected GAR update, truth)")
right.loglog(sizes, ratios, "o-")
right.set(xlabel="images n", title="variance of NSLR / variance of GAR")
plt.show()
