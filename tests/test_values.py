"""ValueUpdater against least squares written out, and what it does to a policy."""

import io
import math

import pytest
import torch

from ola_augment import GARUpdater, OLAPolicy, Operation, SearchSpace, UniformPolicy
from ola_augment.training import ValueUpdater, cosine_reward, gradient_alignment_reward, normalize

SPACE = SearchSpace(
    (Operation("identity"), Operation("rotate", 0, 30, signed=True), Operation("color", 0, 2)), 5
)


def by_alignments(policy, **options):
    return ValueUpdater(policy, reward=gradient_alignment_reward, **options)


def draws(policy, steps, n=64):
    generator = torch.Generator().manual_seed(0)
    return [policy.sample(n, generator) for _ in range(steps)]


def worth(actions, values):
    """Sum over the applied slots of values[a][k], as plain loops."""
    rows = []
    for ops, keep, bins in zip(
        actions.ops.tolist(), actions.keep.tolist(), actions.magnitude_bins.tolist(), strict=True
    ):
        slots = zip(ops, keep, bins, strict=True)
        rows.append(sum(values[a][k] for a, kept, k in slots if kept))
    return torch.tensor(rows, dtype=torch.float64)


def test_the_estimates_are_those_of_ridge_regression_over_all_examples():
    policy = OLAPolicy(SPACE, max_ops=2, strength=1.2)
    updater = by_alignments(policy, decay=0.9, prior=3.0)
    drawn = draws(policy, 6)
    rewards = [torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for actions, values in zip(drawn, rewards, strict=True):
        updater.step(actions, values)
    # One indicator for each (operation, bin), constrained to quadratics of the bin.
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    basis = torch.stack((torch.ones(5), x * 3**0.5, (3 * x**2 - 1) / 2 * 5**0.5), 1)
    rows, weights = [], []
    for age, actions in zip(range(5, -1, -1), drawn, strict=True):
        design = torch.zeros(64, 9, dtype=torch.float64)
        for i in range(64):
            for s in range(2):
                if actions.keep[i, s]:
                    a, k = int(actions.ops[i, s]), int(actions.magnitude_bins[i, s])
                    used = basis[k] * torch.tensor([1.0, 0, 0] if a == 0 else [1.0, 1, 1])
                    design[i, 3 * a : 3 * a + 3] += used
        rows.append(design - design.mean(0))
        weights += [0.9**age] * 64
    design, weights = torch.cat(rows), torch.tensor(weights, dtype=torch.float64)
    target = torch.cat([normalize(values).double() for values in rewards])
    covariance = torch.linalg.inv(design.T @ (weights[:, None] * design) + 3 * torch.eye(9))
    solution = covariance @ design.T @ (weights * target)
    table = basis @ solution.view(3, 3).T
    table[:, 0] = solution[0]
    found = updater.values()
    table = table.T  # (A, K)
    means = table.mean(1)
    torch.testing.assert_close(found.operation, means - means.mean(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.magnitude, table - means[:, None], rtol=1e-9, atol=1e-12)
    every = torch.zeros(3, 5, 9, dtype=torch.float64)
    for a in range(3):
        every[a, :, 3 * a : 3 * a + 3] = basis if a else basis * torch.tensor([1.0, 0, 0])
    by_operation = every.mean(1) - every.mean((0, 1))
    by_magnitude = every - every.mean(1, keepdim=True)
    for std, contrast in ((found.operation_std, by_operation), (found.magnitude_std, by_magnitude)):
        expected = torch.einsum("...f,fg,...g->...", contrast, covariance, contrast).sqrt()
        torch.testing.assert_close(std, expected, rtol=1e-9, atol=1e-9)
    assert not found.magnitude_std[0].any()  # it has no magnitude


def test_good_operations_and_magnitudes_are_drawn_more_and_none_dies():
    policy = OLAPolicy(SPACE, max_ops=2, strength=1.0)
    updater = by_alignments(policy)
    values = [[0.0] * 5, [0.0, 0.5, 1.0, 0.5, 0.0], [-0.5] * 5]
    noise, chance = torch.Generator().manual_seed(1), torch.Generator().manual_seed(0)
    for _ in range(100):
        actions = policy.sample(64, chance)
        signal = worth(actions, values) + torch.randn(64, generator=noise).double()
        stats = updater.step(actions, signal.float())
    assert stats.stepped
    assert stats.clipped == 0
    assert stats.reward_mean == pytest.approx(float(signal.mean()), rel=1e-4)
    assert stats.reward_std == pytest.approx(float(signal.std(correction=0)), rel=1e-4)
    assert stats.entropy == pytest.approx(float(policy.entropy().detach()), rel=1e-6)
    assert not policy.magnitude_logits[0].any()  # it has no magnitude, and so no preference
    probs, magnitude = policy.log_probs().ops.exp(), policy.log_probs().magnitude.exp()
    # A quadratic is no tent: drawn with its best bin, the mean over all is undervalued.
    assert probs[:2].min() > 0.3 > probs[2] > 0.003
    assert int(magnitude[1].argmax()) == 2
    assert policy.strength == 1.0


def test_the_start_and_equal_rewards_leave_the_policy_uniform():
    policy = OLAPolicy(SPACE, strength=1.0, max_ops=3)
    by_alignments(policy).step(*draws(policy, 1), torch.ones(64))
    torch.testing.assert_close(policy.log_probs().ops.exp(), torch.full((3,), 1 / 3))
    torch.testing.assert_close(policy.keep_logits.detach(), torch.zeros(3))


def test_the_most_and_the_least_probable_differ_by_the_limit():
    policy = OLAPolicy(SPACE, max_ops=2, strength=2)
    updater = by_alignments(policy, scale=0.5, limit=3.0)
    for actions in draws(policy, 200):
        updater.step(actions, worth(actions, [[-1.0] * 5, [1.0] * 5, [-1.0] * 5]).float())
    probs = policy.log_probs().ops.detach().exp()
    assert float(probs[1] / probs[0]) == pytest.approx(math.exp(3.0), rel=1e-2)


def test_settings_that_are_not_given():
    given = {"decay": 0.997, "scale": 1.0, "limit": 4.0, "prior": 10.0, "explore": False}
    one = by_alignments(OLAPolicy(SPACE, max_ops=2, strength=1.0))
    other = by_alignments(OLAPolicy(SPACE, max_ops=2, strength=1.0), **given)
    for actions in draws(one.policy, 20):
        signal = worth(actions, [[0.0] * 5, [0.0, 0.5, 1.0, 0.5, 0.0], [-0.5] * 5]).float()
        assert one.step(actions, signal).stepped
        other.step(actions, signal)
    assert torch.equal(one.policy.keep_logits, other.policy.keep_logits)
    assert torch.equal(one.policy.magnitude_logits, other.policy.magnitude_logits)
    assert one.reward is gradient_alignment_reward
    assert ValueUpdater(one.policy).reward is cosine_reward


def test_with_decay_1_the_order_of_steps_does_not_matter():
    found = []
    for order in (1, -1):
        updater = by_alignments(OLAPolicy(SPACE, max_ops=2, strength=1.0), decay=1.0)
        for i, actions in [*enumerate(draws(updater.policy, 4))][::order]:
            updater.step(actions, torch.randn(64, generator=torch.Generator().manual_seed(i)))
        found.append(updater.values())
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_rewards_may_take_norms():
    policy = OLAPolicy(SPACE, max_ops=2, strength=1.0)
    updater = ValueUpdater(policy, reward=cosine_reward)
    [actions] = draws(policy, 1)
    assert updater.takes_norms
    with pytest.raises(ValueError, match="norms"):
        updater.step(actions, torch.randn(64))
    updater.step(actions, torch.randn(64), torch.rand(64))
    assert policy.keep_logits.any()


def test_state_comes_back_and_others_are_refused():
    one = by_alignments(OLAPolicy(SPACE, max_ops=2, strength=1.0))
    other = ValueUpdater(
        OLAPolicy(SPACE, max_ops=2, strength=1.0), reward=gradient_alignment_reward
    )
    first, second = draws(one.policy, 2)
    signal = torch.randn(64)
    one.step(first, signal)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for updater in (one, other):
        updater.step(second, signal)
    assert torch.equal(one.policy.magnitude_logits, other.policy.magnitude_logits)
    wrong = ValueUpdater(OLAPolicy(strength=1.0)).state_dict()
    nan = one.state_dict() | {"moment": torch.full((9,), torch.nan)}
    adam = GARUpdater(OLAPolicy(SPACE, max_ops=2)).state_dict()
    none = one.state_dict() | {"precision": None}
    for state, message in (
        (wrong, r"precision must have shape \(9, 9\), got \(57, 57\)"),
        (nan, "moment holds NaN"),
        (none, r"precision must have shape \(9, 9\), got None"),
        (adam, "state is of a GARUpdater, this is a ValueUpdater"),
        ({}, "None"),
    ):
        with pytest.raises(ValueError, match=message):
            one.load_state_dict(state)


def test_while_it_explores_the_logits_stay_and_then_are_those_of_all_it_saw():
    exploring = by_alignments(OLAPolicy(SPACE, max_ops=2, strength=1.0), explore=True)
    at_once = by_alignments(OLAPolicy(SPACE, max_ops=2, strength=1.0))
    for actions in draws(OLAPolicy(SPACE, max_ops=2, strength=1.0), 3):
        signal = worth(actions, [[0.0] * 5, [1.0] * 5, [-1.0] * 5]).float()
        assert not exploring.step(actions, signal).stepped
        assert at_once.step(actions, signal).stepped
        assert not exploring.policy.keep_logits.any()
    assert exploring.state_dict()["explores"]
    exploring.commit()
    assert torch.equal(exploring.policy.keep_logits, at_once.policy.keep_logits)
    assert torch.equal(exploring.policy.magnitude_logits, at_once.policy.magnitude_logits)
    [actions] = draws(exploring.policy, 1)
    assert exploring.step(actions, torch.randn(64)).stepped  # and goes on
    assert not exploring.state_dict()["explores"]
    exploring.policy.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        exploring.commit()
    with pytest.raises(ValueError, match="explores"):
        exploring.load_state_dict(exploring.state_dict() | {"explores": "yes"})


def test_bad_steps_change_nothing():
    updater = ValueUpdater(
        OLAPolicy(SPACE, max_ops=2, strength=1.0), reward=gradient_alignment_reward
    )
    [actions] = draws(updater.policy, 1)
    updater.step(actions, torch.randn(64))
    before = updater.state_dict(), updater.policy.keep_logits.clone()
    foreign = actions._replace(ops=actions.ops + 3)
    for bad in (
        (actions, torch.full((64,), torch.nan)),
        (actions, torch.ones(63)),
        (foreign, torch.randn(64)),
    ):
        with pytest.raises(ValueError, match=r"alignments|ops"):
            updater.step(*bad)
    updater.policy.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        updater.step(actions, torch.randn(64))
    assert torch.equal(before[0]["precision"], updater.state_dict()["precision"])
    assert torch.equal(before[1], updater.policy.keep_logits)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ValueUpdater(OLAPolicy()), ValueError, "strength"),
        (lambda: ValueUpdater(UniformPolicy()), TypeError, "OLAPolicy"),
        (lambda: ValueUpdater(OLAPolicy(strength=1.0), decay=0), ValueError, "decay"),
        (lambda: ValueUpdater(OLAPolicy(strength=1.0), decay=1.01), ValueError, "decay"),
        (lambda: ValueUpdater(OLAPolicy(strength=1.0), scale=math.nan), ValueError, "scale"),
        (lambda: ValueUpdater(OLAPolicy(strength=1.0), scale=math.inf), ValueError, "scale"),
        (lambda: ValueUpdater(OLAPolicy(strength=1.0), limit=0), ValueError, "limit"),
        (lambda: ValueUpdater(OLAPolicy(strength=1.0), prior=-1), ValueError, "prior"),
        (lambda: ValueUpdater(OLAPolicy(strength=1.0), reward=3), TypeError, "reward"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
