"""The example in one file, without the package, learns what the package learns."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ola_augment import GARUpdater, OLAAugment, OLALearner

FILE = Path(__file__).parents[1] / "examples" / "ola_in_one_file.py"


@pytest.fixture(scope="module")
def one_file():
    return runpy.run_path(str(FILE), run_name="example")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(900, 3)
    )


def batch(seed, n=24):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = F.interpolate(coarse, size=(32, 32))
    return images, torch.randint(0, 3, (n,), generator=generator)


def test_it_does_not_use_the_package():
    assert not re.search(r"^\s*(from|import) ola_augment", FILE.read_text(), re.MULTILINE)


def test_draws_and_images_are_those_of_the_package(one_file):
    """From the same uniform numbers, bit by bit."""
    images, _ = batch(0, 300)
    policy = one_file["Policy"]()
    draws = policy.sample(300, torch.Generator().manual_seed(1))
    mine = torch.stack([one_file["augment"](i, d) for i, d in zip(images, draws, strict=True)])
    transform = OLAAugment("wide_long", generator=torch.Generator().manual_seed(1))
    theirs, actions = transform.augment(images)
    assert [o.name for o in transform.space.operations] == list(one_file["OPERATIONS"])
    assert [len(drawn) for drawn in draws] == actions.num_ops.tolist()
    assert torch.equal(mine, theirs)
    difference = (policy.log_prob(draws) - actions.log_prob).detach()
    # But for the constant of the uniform choice among r operations.
    for r in range(1, 5):
        assert difference[actions.num_ops == r].std() < 1e-5


def test_three_pairs_lead_to_the_same_logits(one_file):
    model, optimizer = network(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    policy = one_file["Policy"]()
    meta_optimizer = torch.optim.Adam(policy.logits, lr=0.1)
    generator = torch.Generator().manual_seed(2)

    other = network()
    augment = OLAAugment("wide_long", generator=torch.Generator().manual_seed(2))
    learner = OLALearner(other, augment, updater=GARUpdater(augment.policy, lr=0.1))
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    for index in range(3):
        batches = batch(2 * index), batch(2 * index + 1)
        one_file["pair"](
            model, F.cross_entropy, optimizer, policy, meta_optimizer, *batches, generator
        )
        for (images, targets), half in zip(
            batches, (learner.augmented_step, learner.plain_step), strict=True
        ):
            with half():
                seen = images if half == learner.plain_step else learner.augment(images)
                F.cross_entropy(other(seen.float() / 255), targets).backward()
            other_optimizer.step()
            other_optimizer.zero_grad()
    for mine, theirs in zip(policy.logits, augment.policy.named_logits().values(), strict=True):
        assert mine.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_it_trains(one_file, capsys):
    one_file["main"](pairs=4)
    assert "kept" in capsys.readouterr().out
