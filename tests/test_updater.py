"""Rewards and updaters against equation 3 written out."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ola_augment import GARUpdater, NSLRUpdater, OLAPolicy, SplitPolicy, UniformPolicy
from ola_augment.training import cosine_reward, gradient_alignment_reward, next_step_loss_reward


def logits_of(policy):
    return [logits.detach().clone() for logits in policy.named_logits().values()]


def unchanged(policy, before):
    return all(
        torch.equal(a, b) for a, b in zip(before, policy.named_logits().values(), strict=True)
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_rewards_have_mean_0_and_std_1(values):
    rewards = gradient_alignment_reward(torch.tensor(values, dtype=torch.float64))
    assert rewards.isfinite().all()
    assert abs(float(rewards.mean())) < 1e-6
    if rewards.any():
        assert math.isclose(float(rewards.std(correction=0)), 1, rel_tol=1e-6)
    else:
        assert max(values) - min(values) <= 1e-9 * max(1, *(abs(v) for v in values))


def test_reward_of_a_single_or_of_equal_examples_is_zero():
    assert gradient_alignment_reward(torch.tensor([3.0])).tolist() == [0]
    assert gradient_alignment_reward(torch.full((7,), 0.1)).tolist() == [0] * 7


def test_next_step_loss_reward_prefers_a_small_loss():
    rewards = next_step_loss_reward(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(rewards, torch.tensor([1.0, -1.0]))


def test_step_is_equation_3():
    """One SGD step moves the logits by lr times the mean of r_i grad log p(a_i)."""
    policy = OLAPolicy("rand_augment")
    actions = policy.sample(32, torch.Generator().manual_seed(0))
    alignments = torch.randn(32, generator=torch.Generator().manual_seed(1))
    before = logits_of(policy)
    rewards = (alignments - alignments.mean()) / alignments.std(correction=0)
    objective = (rewards * policy.log_prob(actions)).mean()
    gradients = torch.autograd.grad(objective, list(policy.named_logits().values()))
    updater = GARUpdater(policy, optimizer=torch.optim.SGD(policy.named_logits().values(), lr=0.5))
    stats = updater.step(actions, alignments)
    for old, gradient, new in zip(before, gradients, policy.named_logits().values(), strict=True):
        torch.testing.assert_close(new.detach(), old + 0.5 * gradient)
    assert stats.stepped
    assert math.isclose(stats.reward_mean, float(alignments.mean()), rel_tol=1e-5)
    assert math.isclose(stats.reward_std, float(alignments.std(correction=0)), rel_tol=1e-5)
    assert math.isclose(stats.entropy, float(policy.entropy().detach()), rel_tol=1e-6)
    assert all(logits.grad is None for logits in policy.named_logits().values())


def test_rewarding_operations_become_likelier():
    policy = OLAPolicy("rand_augment")
    updater = GARUpdater(policy, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        actions = policy.sample(128, generator)
        inverted = ((actions.ops == 4) & actions.keep).any(1)
        updater.step(actions, -inverted.float())
    keep = policy.keep_logits.sigmoid()
    assert int(keep.argmin()) == 4
    assert keep[4] < 0.1


def test_accumulate_averages_the_gradients_of_several_steps():
    policy = OLAPolicy("rand_augment")
    optimizer = torch.optim.SGD(policy.named_logits().values(), lr=1.0)
    updater = GARUpdater(policy, accumulate=2, optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    batches = [(policy.sample(8, generator), torch.randn(8, generator=generator)) for _ in "ab"]
    objective = sum(
        (gradient_alignment_reward(alignments) * policy.log_prob(actions)).mean() / 2
        for actions, alignments in batches
    )
    expected = torch.autograd.grad(objective, list(policy.named_logits().values()))
    before = logits_of(policy)
    assert not updater.step(*batches[0]).stepped
    assert unchanged(policy, before)
    assert updater.step(*batches[1]).stepped
    for old, gradient, new in zip(before, expected, policy.named_logits().values(), strict=True):
        torch.testing.assert_close(new.detach(), old + gradient)


def test_alignments_of_several_passes_are_refused_with_the_cause():
    policy = OLAPolicy("rand_augment")
    updater, actions = GARUpdater(policy), policy.sample(6)
    with pytest.raises(ValueError, match=r"\(6,\), got \(12,\): the model was called 2 times"):
        updater.step(actions, torch.randn(12))
    updater.step(actions, torch.randn(12).view(2, -1).sum(0))


def test_old_actions_are_corrected_by_their_recorded_log_prob():
    """The update's expectation over stale draws is that over fresh draws."""
    policy = SplitPolicy(3, inverted=False)
    splits = torch.arange(3)
    reward = torch.tensor([1.0, 0.0, -1.0])
    stale = policy.sample(60_000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.logits.copy_(torch.tensor([0.5, -0.5, 0.2]))
    log_probs = policy.log_probs()
    exact = torch.autograd.grad((log_probs.exp() * reward).sum(), policy.logits)[0]
    rewards = reward[stale.splits]
    updater = GARUpdater(policy, optimizer=torch.optim.SGD(policy.named_logits().values(), lr=1.0))
    before = policy.logits.detach().clone()
    updater.step(stale, rewards)
    # Normalising divides by the rewards' spread and subtracts a constant, which has no gradient
    # in expectation.
    moved = (policy.logits.detach() - before) * rewards.std(correction=0)
    torch.testing.assert_close(moved, exact, rtol=0, atol=0.01)
    assert splits.shape == exact.shape


def test_entropy_weight_climbs_the_entropy():
    policy = OLAPolicy("rand_augment")
    with torch.no_grad():
        policy.magnitude_logits[:, 0] = 2
    actions = policy.sample(16, torch.Generator().manual_seed(0))
    before = float(policy.entropy().detach())
    stats = GARUpdater(policy, entropy_weight=1.0).step(actions, torch.zeros(16))
    assert stats.entropy > before
    assert (policy.magnitude_logits[:, 0] < 2).all()


def test_nslr_normalises_over_its_window():
    policy = OLAPolicy("rand_augment")
    optimizer = torch.optim.SGD(policy.named_logits().values(), lr=1.0)
    updater = NSLRUpdater(policy, accumulate=2, optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    first, second = policy.sample(4, generator), policy.sample(4, generator)
    objective = policy.log_prob(first).mean() - policy.log_prob(second).mean()
    expected = torch.autograd.grad(objective / 2, list(policy.named_logits().values()))
    before = logits_of(policy)
    assert not updater.step(first, torch.tensor(1.0)).stepped
    assert updater.step(second, torch.tensor(2.0)).stepped
    for old, gradient, new in zip(before, expected, policy.named_logits().values(), strict=True):
        torch.testing.assert_close(new.detach(), old + gradient)


@pytest.mark.parametrize("kind", [GARUpdater, NSLRUpdater])
def test_state_continues_exactly(kind, tmp_path):
    def run(updater, policy, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            actions = policy.sample(8, generator)
            signal = torch.rand(8 if kind is GARUpdater else (), generator=generator)
            updater.step(actions, signal)

    policy = OLAPolicy("rand_augment")
    updater = kind(policy, accumulate=3)
    run(updater, policy, range(4))
    torch.save({"policy": policy.state_dict(), "updater": updater.state_dict()}, tmp_path / "ckpt")
    run(updater, policy, range(4, 9))

    other = OLAPolicy("rand_augment")
    resumed = kind(other, accumulate=3)
    state = torch.load(tmp_path / "ckpt", weights_only=True)
    other.load_state_dict(state["policy"])
    resumed.load_state_dict(state["updater"])
    run(resumed, other, range(4, 9))
    assert unchanged(other, logits_of(policy))
    wrong = kind(OLAPolicy("wide_long"), accumulate=3)
    with pytest.raises(ValueError, match="state is for logits"):
        wrong.load_state_dict(state["updater"])


def test_nslr_makes_an_update_of_ten_steps_unless_told():
    policy = OLAPolicy("rand_augment")
    updater = NSLRUpdater(policy)
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(10, generator=generator)
    stepped = [updater.step(policy.sample(8, generator), loss).stepped for loss in losses]
    assert stepped == [False] * 9 + [True]
    # Adam's first step is that of lr in every entry with a gradient.
    largest = max(float(logits.abs().max()) for logits in logits_of(policy))
    assert math.isclose(largest, 0.1, rel_tol=1e-3)


def test_states_that_do_not_fit_are_refused():
    policy = OLAPolicy("rand_augment")
    updater = GARUpdater(policy, accumulate=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        updater.step(policy.sample(8, generator), torch.randn(8, generator=generator))
    state = updater.state_dict()
    assert (len(state["pending"]), state["examples"]) == (2, [8.0, 8.0])
    for fewer in (1, 2):
        with pytest.raises(ValueError, match=f"holds 2 steps, this updater accumulates {fewer}"):
            GARUpdater(policy, accumulate=fewer).load_state_dict(state)
    optimizer = state["optimizer"]
    [group] = optimizer["param_groups"]
    grouped = {**optimizer, "param_groups": [group, {**group, "params": [9]}]}
    fewer = {**optimizer, "param_groups": [{**group, "params": group["params"][1:]}]}
    nan = [torch.full_like(gradient, math.nan) for gradient in state["pending"][1]]
    for change, message in (
        ({"examples": [8.0]}, "counts the examples of other steps"),
        ({"pending": [state["pending"][0], nan]}, "gradients that are NaN or Inf"),
        ({"optimizer": grouped}, r"other groups than \[3\]"),
        ({"optimizer": fewer}, r"other groups than \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            updater.load_state_dict(state | change)
    del state["examples"]
    with pytest.raises(ValueError, match="counts the examples of other steps"):
        updater.load_state_dict(state)
    with pytest.raises(ValueError, match="another number of losses"):
        NSLRUpdater(policy, accumulate=3).load_state_dict(
            {**state, "kind": "NSLRUpdater", "losses": [torch.tensor(1.0)]}
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_alignments_that_are_not_finite_are_refused(bad):
    policy = OLAPolicy("rand_augment")
    updater = GARUpdater(policy)
    actions = policy.sample(3)
    before = logits_of(policy)
    with pytest.raises(ValueError, match="alignments must be finite, got 1 NaN or Inf of 3"):
        updater.step(actions, torch.tensor([1.0, bad, 2.0]))
    assert unchanged(policy, before)
    assert not updater.state_dict()["pending"]
    with pytest.raises(ValueError, match="next_loss must be finite"):
        NSLRUpdater(policy).step(actions, torch.tensor(bad))


def test_bad_updates_are_refused():
    policy = OLAPolicy("rand_augment")
    updater = GARUpdater(policy)
    with pytest.raises(ValueError, match=r"alignments must have shape \(3,\), got \(2,\)"):
        updater.step(policy.sample(3), torch.zeros(2))
    with pytest.raises(TypeError, match=r"alignments.*int64"):
        updater.step(policy.sample(2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="alignments must be a floating-point tensor, got list"):
        updater.step(policy.sample(2), [0.0, 1.0])
    with pytest.raises(ValueError, match="at least one example"):
        updater.step(policy.sample(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"next_loss must have shape \(\)"):
        NSLRUpdater(policy).step(policy.sample(2), torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GARUpdater(UniformPolicy()), "UniformPolicy has no logits"),
        (lambda: GARUpdater(OLAPolicy(), lr=0), "lr must be positive"),
        (lambda: GARUpdater(OLAPolicy(), accumulate=0), "accumulate"),
        (lambda: GARUpdater(OLAPolicy(), accumulate=1.5), "accumulate"),
        (lambda: GARUpdater(OLAPolicy(), entropy_weight=-1), "entropy_weight"),
        (lambda: NSLRUpdater(OLAPolicy(), accumulate=1), "at least 2"),
    ],
)
def test_bad_updaters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_reward_is_a_function_of_alignments_and_norms():
    alignments, norms = torch.tensor([3.0, -1.0, 4.0, 0.0]), torch.tensor([3.0, 1.0, 8.0, 0.0])
    cosines = torch.tensor([1.0, -1.0, 0.5, 0.0])
    torch.testing.assert_close(cosine_reward(alignments, norms), gradient_alignment_reward(cosines))
    updaters = []
    for reward in (cosine_reward, lambda alignments, norms: alignments / norms.clamp(min=1e-9)):
        policy = OLAPolicy("rand_augment")
        drawn = policy.sample(4, torch.Generator().manual_seed(0))
        updaters.append(GARUpdater(policy, reward=reward))
        assert updaters[-1].step(drawn, alignments, norms).stepped
    assert updaters[0].takes_norms
    assert not GARUpdater(OLAPolicy()).takes_norms


@pytest.mark.parametrize("bad", [torch.ones(3), torch.tensor([1.0, 2.0, 3.0, torch.nan]), None])
def test_bad_norms_and_rewards_change_nothing(bad):
    policy = OLAPolicy("rand_augment")
    drawn = policy.sample(4)
    updater = GARUpdater(policy, reward=cosine_reward)
    with pytest.raises(ValueError, match="norms"):
        updater.step(drawn, torch.ones(4), bad)
    if bad is not None:
        updater = GARUpdater(policy, reward=lambda alignments: bad)
        with pytest.raises(ValueError, match="rewards"):
            updater.step(drawn, torch.ones(4))
    assert not policy.keep_logits.any()
    with pytest.raises(TypeError, match="reward"):
        GARUpdater(policy, reward="cosine")


def test_the_papers_settings_have_a_name():
    updater = GARUpdater.paper(OLAPolicy())
    assert updater.optimizer.param_groups[0]["lr"] == 0.1
    assert updater.reward is gradient_alignment_reward
    assert updater.accumulate == 1
    assert GARUpdater.paper(OLAPolicy(), accumulate=3).accumulate == 3
    assert GARUpdater(OLAPolicy()).optimizer.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1024.0, 2.0**-20])
def test_values_that_differ_by_rounding_alone_earn_nothing(dtype, size):
    """Up to four units of the last place of their size: here half of seven, half of nine."""
    eps = torch.finfo(dtype).eps
    near, apart = (size * torch.tensor([1.0, 1 + k * eps], dtype=dtype) for k in (7, 9))
    assert not gradient_alignment_reward(near).any()
    first, second = gradient_alignment_reward(apart).tolist()
    assert first < 0 < second


class HalfUsed(nn.Module):
    """A user's policy with logits that no draw reads."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))

    def log_prob(self, actions):
        return self.used.log_softmax(0)[actions.choices]

    def entropy(self):
        log_probs = self.used.log_softmax(0)
        return -(log_probs.exp() * log_probs).sum()


def test_logits_that_no_draw_reads_stay():
    policy = HalfUsed()
    actions = SimpleNamespace(choices=torch.tensor([0, 1, 2]), log_prob=torch.full((3,), -1.0986))
    updater = GARUpdater(policy, entropy_weight=0.1)
    assert updater.step(actions, torch.tensor([3.0, 0.0, -3.0])).stepped
    assert not policy.unused.any()
    assert policy.used[0] > policy.used[2]
