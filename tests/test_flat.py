"""Images that augmentation would make flat stay as they were, and this is recorded."""

import pytest
import torch
from torch import nn

from ola_augment import OLAAugment, OLALearner, OLAPolicy, Operation, SearchSpace
from ola_augment.actions import check_actions
from ola_augment.training.flat import nothing_applied, spare_flat

DARK = SearchSpace((Operation("brightness", 0.0, 0.001), Operation("invert")), 2)


def images(dtype, n=64):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return levels if dtype == torch.uint8 else levels.to(dtype) / 255


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (torch.uint8, None),
        (torch.uint16, (0, 4095)),
        (torch.int16, (-1000, 2000)),
        (torch.bfloat16, None),
        (torch.float32, (0.0, 1.6)),
    ],
)
def test_flat_images_stay_as_they_were_and_the_actions_say_so(dtype, given):
    generator = torch.Generator().manual_seed(1)
    augment = OLAAugment(DARK, strength=1.0, generator=generator, value_range=given)
    before = images(torch.uint8)
    if dtype != torch.uint8:
        low, high = given or (0, 1)
        before = (images(torch.float32) * (high - low) + low).to(dtype)
    before[:5] = before[:5, :1, :1, :1]  # flat already
    after, actions = augment.augment(before)
    top = augment.range_of(before)
    spared, kept, count = spare_flat(before, after, actions, augment.policy, top)
    black = (actions.keep & (actions.ops == 0)).any(1)
    black[:5] = False
    assert 0 < count == int(black.sum())
    spared, before, after = spared.double(), before.double(), after.double()
    assert torch.equal(spared[black], before[black])
    assert torch.equal(spared[~black], after[~black])
    assert not kept.keep[black].any()
    assert torch.equal(augment.replay(before.to(dtype), kept).double(), spared)
    torch.testing.assert_close(kept.log_prob, augment.policy.log_prob(kept).detach())


def test_what_a_policy_never_does_keeps_the_log_probability_of_its_draw():
    """All of ``max_ops`` slots are applied: dropping them has no log-probability of its own."""
    policy = OLAPolicy(DARK, max_ops=2, strength=2.0)
    actions = policy.sample(4)
    spared = nothing_applied(actions, torch.arange(4) < 2, policy)
    assert not spared.keep[:2].any()
    assert torch.equal(spared.log_prob, actions.log_prob)
    check_actions(spared, policy.space)


def test_a_learner_spares_them_and_says_so_once():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    augment = OLAAugment(DARK, strength=1.0, generator=torch.Generator().manual_seed(1))
    held_out = [(images(torch.float32), torch.zeros(64, dtype=torch.long))]
    learner = OLALearner.recommended(model, augment, held_out, pairs=1000)
    for _ in range(3):  # too few to tell
        assert (learner.augment(images(torch.uint8)).float().std(dim=(1, 2, 3)) > 8).all()
    with pytest.warns(UserWarning, match="% of the images flat"):
        learner.augment(images(torch.uint8))
    learner.augment(images(torch.uint8))
    assert learner.augmented == 320
    assert 60 < learner.flat < 220


def test_flat_images_are_counted_on_after_a_stop():
    learner, other = (
        OLALearner.recommended(
            nn.Linear(1, 2), OLAAugment(strength=1.0), [(torch.zeros(8, 1), torch.arange(8))], 1200
        )
        for _ in range(2)
    )
    learner._flats.augmented, learner._flats.flat = 90, 4
    other.load_state_dict(learner.state_dict())
    assert (other.augmented, other.flat) == (90, 4)
    with pytest.raises(ValueError, match="damaged: counts"):
        other.load_state_dict({**learner.state_dict(), "flat": {"augmented": 1, "flat": -1}})
