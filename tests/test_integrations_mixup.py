"""Rewards of mixed examples are credited to the images that they are made of."""

import pytest
import torch
import torch.nn.functional as F
from loops import loader, logits, network, optimizer_of

from ola_augment import GARUpdater, OLAAugment, OLALearner
from ola_augment.training import cosine_reward

timm = pytest.importorskip("timm")
from timm.loss import SoftTargetCrossEntropy  # noqa: E402

from ola_augment.integrations.mixup import CreditedMixup  # noqa: E402


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_credit_is_the_share_of_the_image(mode, cutmix):
    """The share of each image in each example, read off images that are one-hot."""
    n = 6
    mixup = CreditedMixup(0.4 if not cutmix else 0.0, cutmix, mode=mode, num_classes=3)
    images = torch.eye(n)[:, :, None, None].expand(n, n, 8, 8).clone()
    for _ in range(20):
        mixed, _ = mixup(images.clone(), torch.zeros(n, dtype=torch.long))
        shares = mixed.mean((2, 3))  # (examples, images)
        earned = torch.randn(n)
        found = mixup.credited(lambda alignments: alignments)(earned)
        torch.testing.assert_close(found, earned @ shares)


@pytest.mark.parametrize("norms", [False, True])
def test_in_a_learner(norms):
    torch.manual_seed(0)
    model, augment = network(), OLAAugment("rand_augment", max_ops=2)
    mixup = CreditedMixup(mixup_alpha=0.4, num_classes=3)
    reward = mixup.credited(cosine_reward) if norms else mixup.credited()
    learner = OLALearner(model, augment, updater=GARUpdater(augment.policy, reward=reward))
    optimizer, criterion = optimizer_of(model, lr=0.01), SoftTargetCrossEntropy()
    for index, (images, targets) in enumerate(loader()):
        if index % 2 == 0:
            with learner.augmented_step():
                mixed, soft = mixup(learner.augment(images).float() / 255, targets)
                criterion(model(mixed), soft).backward()
        else:
            with learner.plain_step():
                F.cross_entropy(model(images.float() / 255), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learner.pairs == 6
    assert logits(learner).any()


def test_rewards_of_other_batches_are_refused():
    mixup = CreditedMixup(mixup_alpha=0.4, num_classes=3)
    reward = mixup.credited()
    with pytest.raises(ValueError, match="mix every augmented batch once"):
        reward(torch.randn(4))
    for _ in range(2):  # the first one missed its reward
        mixup(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    assert reward(torch.randn(4)).shape == (4,)
    mixup(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="6 rewards"):
        reward(torch.randn(6))
