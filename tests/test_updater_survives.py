"""What goes wrong in one step of an updater stays in that step."""

import math
from datetime import timedelta

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch import nn

from ola_augment import GARUpdater, NSLRUpdater, OLAAugment, OLALearner, OLAPolicy, Thermostat
from ola_augment.training.ranks import all_ranks, mean_over_ranks, sum_over_ranks
from ola_augment.training.reward import normalize

B = 8


def drawn(policy, seed=0, n=B):
    return policy.sample(n, torch.Generator().manual_seed(seed))


def values(seed, n=B):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def logits_of(policy):
    return nn.utils.parameters_to_vector(policy.named_logits().values()).detach().clone()


def test_actions_of_long_ago_do_not_overflow():
    policy = OLAPolicy("rand_augment", 2)
    actions = drawn(policy)
    old = actions._replace(log_prob=actions.log_prob - 100)
    updater = GARUpdater(policy)
    stats = updater.step(old, values(0))
    assert stats.clipped == 1
    assert logits_of(policy).isfinite().all()
    assert updater.step(drawn(policy), values(1)).clipped == 0
    half = [actions.log_prob[: B // 2] - 5, actions.log_prob[B // 2 :]]
    assert updater.step(actions._replace(log_prob=torch.cat(half)), values(2)).clipped == 0.5


def test_a_cut_weight_pulls_ten_times():
    gradients = []
    for shift in (-1e-9, -100.0):
        policy = OLAPolicy("rand_augment", 2)
        updater = GARUpdater(policy, optimizer=torch.optim.SGD(policy.named_logits().values(), 1.0))
        actions = drawn(policy)
        updater.step(actions._replace(log_prob=actions.log_prob + shift), values(0))
        gradients.append(logits_of(policy))
    torch.testing.assert_close(gradients[1], 10 * gradients[0])


def test_the_largest_weight_itself_is_not_cut(monkeypatch):
    # That of fresh actions.
    monkeypatch.setattr("ola_augment.training.policy_gradient.MAX_WEIGHT", 1.0)
    policy = OLAPolicy("rand_augment", 2)
    updater = GARUpdater(policy)
    actions = drawn(policy)
    old = actions._replace(log_prob=actions.log_prob - torch.eye(B)[3])
    assert updater.step(old, values(0)).clipped == 1 / B
    assert GARUpdater(OLAPolicy("rand_augment", 2)).step(actions, values(0)).clipped == 0


class Interrupted(torch.optim.Adam):
    """Stops halfway, once."""

    armed = False

    def step(self, closure=None):
        super().step(closure)
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [GARUpdater, NSLRUpdater])
def test_a_step_is_all_or_nothing(kind):
    found = []
    for interrupt in (False, True):
        policy = OLAPolicy("rand_augment", 2)
        optimizer = Interrupted(policy.named_logits().values(), lr=0.1)
        updater = kind(policy, accumulate=2, optimizer=optimizer)

        def step(seed, updater=updater, policy=policy):
            signal = values(seed) if kind is GARUpdater else values(seed, 1)[0]
            return updater.step(drawn(policy, seed), signal)

        for seed in range(3):
            step(seed)
        if interrupt:
            before = logits_of(policy)
            optimizer.armed = True
            with pytest.raises(KeyboardInterrupt):
                step(3)
            assert torch.equal(before, logits_of(policy))
        assert step(3).stepped
        assert step(4).stepped is False
        found.append(logits_of(policy))
    assert torch.equal(*found)


def test_a_meta_optimizer_that_diverges_changes_nothing():
    policy = OLAPolicy("rand_augment", 2)
    optimizer = torch.optim.SGD(policy.named_logits().values(), lr=1e38, momentum=0.9)
    updater = GARUpdater(policy, optimizer=optimizer)
    before = logits_of(policy)
    with torch.no_grad():
        policy.keep_logits.fill_(3e38)
        policy.keep_logits.neg_()
    before = logits_of(policy)
    optimizer.param_groups[0]["lr"] = float("inf")
    with pytest.raises(ValueError, match="NaN or Inf; nothing has changed"):
        updater.step(drawn(OLAPolicy("rand_augment", 2)), values(0))
    assert torch.equal(before, logits_of(policy))


def test_accumulated_steps_count_by_their_examples():
    """Batches of 4 and 12 move the logits as each example's share of 16 does."""
    whole, parts = (OLAPolicy("rand_augment", 2) for _ in range(2))
    actions = drawn(whole, n=16)
    small, large = actions.select(slice(4)), actions.select(slice(4, 16))
    updater = GARUpdater(
        parts, accumulate=2, optimizer=torch.optim.SGD(parts.named_logits().values(), lr=1.0)
    )
    updater.step(small, values(0, 4))
    updater.step(large, values(1, 12))
    rewards = torch.cat(
        [(v - v.mean()) / v.std(correction=0) for v in (values(0, 4), values(1, 12))]
    )
    objective = (rewards * whole.log_prob(actions)).mean()
    expected = torch.autograd.grad(objective, list(whole.named_logits().values()))
    found = logits_of(parts)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]))


def test_a_state_of_another_policy_is_refused_with_nothing_pending():
    one, other = GARUpdater(OLAPolicy("rand_augment", 2)), GARUpdater(OLAPolicy("wide_long", 3))
    one.step(drawn(one.policy), values(0))
    with pytest.raises(ValueError, match="the policy has"):
        other.load_state_dict(one.state_dict())
    other.step(drawn(other.policy), values(0))
    sgd = torch.optim.SGD(one.policy.named_logits().values(), lr=0.1)
    with pytest.raises(ValueError, match="kind of meta-optimizer"):
        one.load_state_dict(GARUpdater(one.policy, optimizer=sgd).state_dict())
    with pytest.raises(ValueError, match="this is a GARUpdater"):
        one.load_state_dict(NSLRUpdater(one.policy).state_dict())


def worker(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank, timeout=timedelta(seconds=60)
    )
    device = torch.device("cpu")
    own = torch.tensor([1.0, 3.0 + 4 * rank])
    assert sum_over_ranks(own).tolist() == [2.0, 10.0]
    assert mean_over_ranks(own).tolist() == [1.0, 5.0]
    assert own.tolist() == [1.0, 3.0 + 4 * rank]
    answers = [all_ranks(okay, device) for okay in (True, False, rank == 0, rank == 1)]
    assert answers == [True, False, False, False]
    expected = (own - 3) / math.sqrt((4 + 0 + 4 + 16) / 4)
    torch.testing.assert_close(normalize(own), expected)
    policy = OLAPolicy("rand_augment", 2)
    # One rank without examples; the reported loss is the mean of both.
    updater = NSLRUpdater(policy, accumulate=2)
    for loss in (1.0, 2.0):
        own = drawn(policy, n=B * rank)
        stats = updater.step(own, torch.tensor(loss + 2 * rank))
        assert stats.clipped == 0
    assert stats.stepped
    assert stats.reward_mean == -2.5
    thermostat = Thermostat(OLAPolicy("rand_augment", strength=1.0), smoothing=0.0)
    thermostat.step(0.25 + 0.5 * rank)
    assert thermostat.accuracy == 0.5
    policy = OLAPolicy("rand_augment", 2)
    updater = GARUpdater(policy)
    bad = values(0) * (float("nan") if rank else 1)
    with pytest.raises(ValueError, match="finite" if rank else "another rank"):
        updater.step(drawn(policy), bad)
    assert not logits_of(policy).any()
    updater.step(drawn(policy), values(rank))
    # One rank's capture fails; both skip, and go on together.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    learner = OLALearner(model, OLAAugment("rand_augment"))
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    for pair in range(2):
        factor = float("nan") if rank and not pair else 1.0
        with learner.augmented_step():
            (factor * model(learner.augment(images) / 255).square().sum()).backward()
        model.zero_grad()
        with learner.plain_step() as step:
            model(images / 255).square().sum().backward()
        model.zero_grad()
        assert (step.stats is None) == (not pair)
    assert learner.skipped.total() == 1
    dist.destroy_process_group()


def test_ranks_skip_together():
    run_ranks(worker)


def test_the_entropy_bonus_is_added():
    """One step of SGD: the objective's gradient and a multiple of the entropy's."""
    found = []
    for weight in (0.0, 0.5):
        policy = OLAPolicy("rand_augment", 2)
        with torch.no_grad():
            policy.keep_logits.fill_(1.0)
        optimizer = torch.optim.SGD(policy.named_logits().values(), lr=1.0)
        updater = GARUpdater(policy, optimizer=optimizer, entropy_weight=weight)
        before = logits_of(policy)
        bonus = torch.autograd.grad(policy.entropy(), list(policy.named_logits().values()))
        updater.step(drawn(policy), values(0))
        found.append(logits_of(policy) - before)
    expected = 0.5 * torch.cat([gradient.flatten() for gradient in bonus])
    torch.testing.assert_close(found[1] - found[0], expected, rtol=1e-4, atol=1e-6)
