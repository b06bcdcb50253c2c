"""Policies against full enumeration, exact gradients and counted draws."""

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from ola_augment import (
    Actions,
    OLAPolicy,
    Operation,
    RandAugmentPolicy,
    SearchSpace,
    UniformPolicy,
)

SMALL = SearchSpace(
    (Operation("identity"), Operation("rotate", 0, 30, signed=True), Operation("color", 0, 2)), 2
)


def random_policy(space=SMALL, max_ops=2, seed=0, scale=1.0, strength=None):
    policy = OLAPolicy(space, max_ops, strength=strength).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logits in learned(policy):
            logits.copy_(scale * torch.randn(logits.shape, generator=generator))
    return policy


def learned(policy):
    return [logits for logits in policy.named_logits().values() if logits.requires_grad]


def enumerate_actions(policy):
    """Every outcome of a small policy, written as plain loops over Algorithm 2."""
    rows = []
    size, bins = len(policy.space), policy.space.num_magnitude_bins
    for num_ops in range(1, policy.max_ops + 1):
        draws = (
            itertools.product(range(size), repeat=num_ops)
            if policy.replacement
            else itertools.permutations(range(size), num_ops)
        )
        for ops in draws:
            # None: dropped; otherwise the bin.
            for outcome in itertools.product([None, *range(bins)], repeat=num_ops):
                unused = policy.max_ops - num_ops
                kept = [op for op, k in zip(ops, outcome, strict=True) if k is not None]
                if policy.once and len({*kept}) < len(kept):
                    continue  # drawn again, it is dropped
                rows.append(
                    (
                        num_ops,
                        [*ops, *[-1] * unused],
                        [*(k is not None for k in outcome), *[False] * unused],
                        [*(k or 0 for k in outcome), *[0] * unused],
                    )
                )
    num_ops, ops, keep, magnitude_bins = (torch.tensor(field) for field in zip(*rows, strict=True))
    signs = torch.ones_like(ops, dtype=torch.int8)
    return Actions(
        num_ops, ops, keep, magnitude_bins, signs, torch.zeros(*ops.shape, 2), torch.zeros(len(ops))
    )


def key(actions, i):
    return (
        tuple(actions.ops[i].tolist()),
        tuple(actions.keep[i].tolist()),
        tuple(actions.magnitude_bins[i].tolist()),
    )


POLICIES = {
    "ola": random_policy(),
    "ola, three slots": random_policy(max_ops=3, seed=1),
    "strength 0.7": random_policy(seed=5, strength=0.7),
    "strength 0": random_policy(seed=6, strength=0),
    "all slots": random_policy(seed=7, strength=2),
    "uniform": UniformPolicy(SMALL),
    "trivial": UniformPolicy(SMALL, num_ops=1, keep_prob=1.0),
    "never": UniformPolicy(SMALL, keep_prob=0.0),
    "rand": RandAugmentPolicy(SMALL, num_ops=2, magnitude=1),
    "rand, first bin": RandAugmentPolicy(SMALL, num_ops=1, magnitude=0),
    "rand, none": RandAugmentPolicy(SMALL, num_ops=0, magnitude=1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_probabilities_sum_to_one_over_every_outcome(name):
    log_prob = POLICIES[name].log_prob(enumerate_actions(POLICIES[name])).detach()
    assert math.isclose(float(log_prob.double().exp().sum()), 1, abs_tol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_entropy_is_that_of_the_enumerated_distribution(name):
    log_prob = POLICIES[name].log_prob(enumerate_actions(POLICIES[name])).detach().double()
    possible = log_prob[log_prob.isfinite()]
    exact = -(possible.exp() * possible).sum()
    torch.testing.assert_close(
        POLICIES[name].entropy().detach().double(), exact, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", POLICIES)
def test_applied_operations_are_those_of_the_enumerated_distribution(name):
    outcomes = enumerate_actions(POLICIES[name])
    probs = POLICIES[name].log_prob(outcomes).detach().double().exp()
    expected = (probs * outcomes.keep.sum(1)).sum()
    found = POLICIES[name].applied_ops().detach().double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_log_prob_is_algorithm_2_written_out():
    policy = random_policy(seed=2)
    outcomes = enumerate_actions(policy)
    log_prob = policy.log_prob(outcomes).detach()
    with torch.no_grad():
        num_ops = policy.num_ops_logits.softmax(0)
        keep = policy.keep_logits.sigmoid()
        bins = policy.magnitude_logits.softmax(1)
    for i in range(len(outcomes.num_ops)):
        count = int(outcomes.num_ops[i])
        prob = float(num_ops[count - 1]) / math.perm(len(SMALL), count)
        for slot in range(count):
            op = int(outcomes.ops[i, slot])
            if outcomes.keep[i, slot]:
                prob *= float(keep[op]) * float(bins[op, outcomes.magnitude_bins[i, slot]])
            else:
                prob *= 1 - float(keep[op])
        assert math.isclose(float(log_prob[i]), math.log(prob), rel_tol=1e-10)


@pytest.mark.parametrize("name", POLICIES)
def test_sampled_frequencies_follow_the_probabilities(name):
    policy = POLICIES[name]
    n = 20_000
    drawn = policy.sample(n, torch.Generator().manual_seed(0))
    counts = Counter(key(drawn, i) for i in range(n))
    outcomes = enumerate_actions(policy)
    expected = n * policy.log_prob(outcomes).detach().double().exp()
    observed = torch.tensor([counts.pop(key(outcomes, i), 0) for i in range(len(expected))])
    assert not counts, "a draw that the enumeration does not have"
    assert not observed[expected == 0].any()
    possible = expected > 0
    if possible.sum() > 1:
        scaled = expected[possible] * (n / expected[possible].sum())
        assert chisquare(observed[possible], scaled).pvalue > 1e-3


def test_recorded_log_prob_is_that_of_the_actions():
    for policy in POLICIES.values():
        drawn = policy.sample(100, torch.Generator().manual_seed(1))
        assert not drawn.log_prob.requires_grad
        torch.testing.assert_close(drawn.log_prob, policy.log_prob(drawn).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("strength", [None, 0.7, 1.6])
def test_policy_gradient_is_the_gradient_of_the_enumerated_expectation(strength):
    policy = random_policy(seed=3, strength=strength)
    outcomes = enumerate_actions(policy)
    log_prob = policy.log_prob(outcomes)
    reward = torch.randn(len(log_prob), generator=torch.Generator().manual_seed(4)).double()
    logits = learned(policy)
    exact = torch.autograd.grad((log_prob.exp() * reward).sum(), logits, retain_graph=True)
    # E[r grad log p], the estimator's expectation, over every outcome
    expected = torch.autograd.grad((log_prob.exp().detach() * reward * log_prob).sum(), logits)
    for one, other in zip(exact, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_signs_and_centres():
    drawn = OLAPolicy("wide_long").sample(5000, torch.Generator().manual_seed(0))
    signed = torch.tensor([op.signed for op in SearchSpace.wide_long().operations])
    may_be_negative = signed[drawn.ops.clamp(min=0)] & drawn.keep
    negative = drawn.signs == -1
    assert not negative[~may_be_negative].any()
    assert abs(float(negative[may_be_negative].float().mean()) - 0.5) < 0.05
    centers = drawn.centers[drawn.keep]
    assert centers.min() >= 0
    assert centers.max() < 1
    assert (centers.mean(0) - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("make", [OLAPolicy, lambda: UniformPolicy(num_ops=4)])
def test_operations_of_one_image_are_distinct_without_replacement(make):
    drawn = make().sample(2000, torch.Generator().manual_seed(0))
    for ops, count in zip(drawn.ops.tolist(), drawn.num_ops.tolist(), strict=True):
        assert len(set(ops[:count])) == count
        assert ops[count:] == [-1] * (4 - count)


def test_settings_that_are_not_given():
    for policy in (OLAPolicy(), OLAPolicy("rand_augment"), UniformPolicy(), RandAugmentPolicy()):
        assert policy.space.num_magnitude_bins == 31
    assert UniformPolicy().arguments() == {"num_ops": 2, "keep_prob": 0.5}
    assert RandAugmentPolicy().arguments() == {"num_ops": 2, "magnitude": 9}
    assert (OLAPolicy().space.name, UniformPolicy().space.name) == ("wide_long",) * 2
    assert RandAugmentPolicy().space.name == "rand_augment"
    for kind in (OLAPolicy, UniformPolicy, RandAugmentPolicy):
        assert kind("rand_augment", num_magnitude_bins=11).space.num_magnitude_bins == 11


def test_no_operations_are_one_slot_that_is_never_kept():
    drawn = RandAugmentPolicy(num_ops=0).sample(5)
    assert drawn.ops.shape == (5, 1)
    assert not drawn.keep.any()


def test_unused_and_dropped_slots_are_canonical():
    drawn = OLAPolicy("wide_long").sample(500, torch.Generator().manual_seed(0))
    assert not drawn.magnitude_bins[~drawn.keep].any()
    assert (drawn.signs[~drawn.keep] == 1).all()
    assert not drawn.keep[drawn.ops < 0].any()


def test_uniform_start_equals_uniform_probabilities():
    log_probs = OLAPolicy("rand_augment").log_probs()
    torch.testing.assert_close(log_probs.num_ops.exp(), torch.full((4,), 0.25))
    torch.testing.assert_close(log_probs.keep.exp(), torch.full((14,), 0.5))
    torch.testing.assert_close(log_probs.magnitude.exp(), torch.full((14, 31), 1 / 31))


def test_same_seed_same_draw_and_the_next_differs():
    policy = OLAPolicy()
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    first, again = (policy.sample(50, generator) for generator in generators)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first.ops, policy.sample(50, generators[0]).ops)


def test_no_examples():
    drawn = OLAPolicy().sample(0)
    assert drawn.batch_size == 0
    assert drawn.ops.shape == (0, 4)
    assert OLAPolicy().log_prob(drawn).shape == (0,)


def test_actions_collate_select_and_cat():
    from torch.utils.data import default_collate

    drawn = OLAPolicy().sample(6, torch.Generator().manual_seed(0))
    collated = default_collate([drawn.select(i) for i in range(6)])
    joined = Actions.cat([drawn.select(slice(0, 2)), drawn.select([2, 3, 4, 5])])
    for again in (collated, joined):
        assert isinstance(again, Actions)
        assert all(torch.equal(one, other) for one, other in zip(drawn, again, strict=True))
    with pytest.raises(ValueError, match="at least one"):
        Actions.cat([])
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        Actions.cat([drawn, UniformPolicy().sample(2)])


def test_actions_of_another_policy_are_refused():
    policy = OLAPolicy("rand_augment")
    drawn = policy.sample(5, torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match="Actions"):
        policy.log_prob(tuple(drawn))
    with pytest.raises(ValueError, match=r"2 slots, the policy draws 4"):
        policy.log_prob(UniformPolicy("rand_augment").sample(5))
    with pytest.raises(ValueError, match=r"actions.ops must lie in -1 .. 13"):
        policy.log_prob(drawn._replace(ops=drawn.ops + 10))
    with pytest.raises(ValueError, match=r"magnitude_bins must lie in 0 .. 30"):
        policy.log_prob(drawn._replace(magnitude_bins=drawn.magnitude_bins + 31))
    with pytest.raises(ValueError, match=r"actions.keep must have shape \(5, 4\)"):
        policy.log_prob(drawn._replace(keep=drawn.keep[:3]))
    with pytest.raises(TypeError, match=r"actions\.keep must be torch\.bool"):
        policy.log_prob(drawn._replace(keep=drawn.keep.long()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: OLAPolicy(max_ops=0), ValueError, r"1 \.\. 19"),
        (
            lambda: OLAPolicy(SMALL, max_ops=4),
            ValueError,
            r"1 \.\. 3 \(the operations of space 'custom'\), got 4",
        ),
        (lambda: RandAugmentPolicy(num_ops=1001), ValueError, r"1 \.\. 1000, got 1001"),
        (lambda: RandAugmentPolicy(num_ops=-1), ValueError, "num_ops must be 0 or more, got -1"),
        (lambda: OLAPolicy(max_ops=2.0), TypeError, "int"),
        (lambda: UniformPolicy(keep_prob=1.5), ValueError, "keep_prob"),
        (lambda: UniformPolicy(keep_prob=-0.5), ValueError, "keep_prob"),
        (lambda: RandAugmentPolicy(magnitude=31), ValueError, r"0 \.\. 30"),
        (lambda: RandAugmentPolicy(magnitude=-1), ValueError, r"0 \.\. 30, got -1"),
        (lambda: RandAugmentPolicy(magnitude=True), TypeError, "magnitude"),
        (lambda: RandAugmentPolicy(magnitude=9.0), TypeError, "magnitude"),
        (lambda: OLAPolicy("ra"), ValueError, "unknown space"),
        (lambda: OLAPolicy().sample(-1), ValueError, "n must"),
        (lambda: OLAPolicy(strength=4.1), ValueError, r"0 \.\. max_ops = 4, got 4\.1"),
        (lambda: OLAPolicy(strength=-1), ValueError, "strength"),
        (lambda: OLAPolicy(strength=math.nan), ValueError, "strength"),
        (lambda: OLAPolicy(strength="1"), TypeError, "strength"),
        (lambda: OLAPolicy(strength=True), TypeError, "strength"),
        (lambda: OLAPolicy().__setattr__("strength", 1.0), AttributeError, "learns its strength"),
    ],
)
def test_bad_policies_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_strength_is_the_expected_number_of_kept_draws_and_can_be_changed():
    policy = random_policy(SearchSpace.wide_long(), max_ops=4, strength=1.0)
    for strength in (0.0, 0.5, 1.0, 3.2, 4.0):
        policy.strength = strength
        assert policy.strength == pytest.approx(strength)
        applied = policy.sample(20_000, torch.Generator().manual_seed(0)).keep.sum(1).double()
        assert float(applied.mean()) == pytest.approx(
            float(policy.applied_ops().detach()), abs=0.03
        )
        assert 0.9 * strength <= float(applied.mean()) <= strength + 0.03


def test_with_strength_an_operation_is_drawn_as_often_as_algorithm_2_would_keep_it():
    policy = random_policy(seed=8, strength=1.0)
    kept = policy.keep_logits.detach().sigmoid()
    torch.testing.assert_close(policy.log_probs().ops.detach().exp(), kept / kept.sum())


def test_strength_is_in_the_state_is_not_learned_and_bad_states_are_refused():
    policy = OLAPolicy(strength=1.0)
    policy.strength = 2.5
    other = OLAPolicy(strength=0.5)
    other.load_state_dict(policy.state_dict())
    assert other.strength == 2.5
    assert not policy.requires_grad_(True).expected_ops.requires_grad
    for bad in (5.0, -1.0, math.nan):
        with pytest.raises(RuntimeError, match=r"\texpected_ops must lie in 0 \.\. 4, got"):
            other.load_state_dict(policy.state_dict() | {"expected_ops": torch.tensor(bad)})
    assert other.strength == 2.5
    with pytest.raises(RuntimeError, match=r"expected_ops must have shape \(\), got \(2,\)"):
        other.load_state_dict(policy.state_dict() | {"expected_ops": torch.zeros(2)})
    for end in (0.0, 4.0):
        other.load_state_dict(OLAPolicy(strength=end).state_dict())
        assert other.strength == end
    assert OLAPolicy().strength is None


def test_operation_probabilities_need_replacement():
    class Own(UniformPolicy):
        def log_probs(self):
            return super().log_probs()._replace(ops=torch.full((3,), 1 / 3).log())

    with pytest.raises(ValueError, match="replacement=True"):
        Own(SMALL).sample(1)

    class Repeated(RandAugmentPolicy):
        ops = torch.full((3,), 1 / 3).log()

        def log_probs(self):
            return super().log_probs()._replace(ops=self.ops)

    policy = Repeated(SMALL, magnitude=1)
    assert policy.sample(1).ops.shape == (1, 2)
    for ops, error, message in (
        (torch.full((2,), 0.5).log(), ValueError, r"ops must have shape \(3,\), got \(2,\)"),
        ([0.0, 0.0, 0.0], TypeError, "ops must be a floating-point tensor"),
        (torch.zeros(3), ValueError, "ops of Repeated must be log-probabilities"),
    ):
        policy.ops = ops
        with pytest.raises(error, match=message):
            policy.sample(1)


def test_tables_of_logits_that_were_written_meanwhile_serve_one_draw(monkeypatch):
    """Another process writes while they are computed, and later writes the old values again."""
    policy = OLAPolicy(SMALL)
    log_softmax = torch.nn.functional.log_softmax

    def interrupted(logits, dim):
        with torch.no_grad():
            policy.num_ops_logits.copy_(torch.tensor([50.0, 0.0, 0.0]))
        return log_softmax(logits, dim=dim)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "log_softmax", interrupted)
        assert (policy.sample(100).num_ops == 1).all()
    with torch.no_grad():
        policy.num_ops_logits.zero_()
    assert set(policy.sample(100).num_ops.tolist()) == {1, 2, 3}


def test_default_number_of_operations_fits_the_space():
    small = SearchSpace(SearchSpace.wide_long().operations[:3])
    assert OLAPolicy(small).max_ops == 3
    assert OLAPolicy(small, strength=1.0).max_ops == 4  # drawn with replacement
    assert OLAPolicy().max_ops == 4
    with pytest.raises(ValueError, match=r"must be in 1 \.\. 3"):
        OLAPolicy(small, max_ops=4)


def test_with_strength_an_operation_is_applied_at_most_once():
    policy = random_policy(SearchSpace.wide_long(), max_ops=6, strength=5.0)
    drawn = policy.sample(2000, torch.Generator().manual_seed(0))
    kept = torch.where(drawn.keep, drawn.ops, -1 - torch.arange(6)).sort(dim=1).values
    assert (kept[:, 1:] != kept[:, :-1]).all()
    assert (drawn.ops.sort(dim=1).values.diff(dim=1) == 0).any()  # drawn again, and dropped
    row = int((drawn.keep.sum(1) > 1).nonzero()[0])
    first, second = drawn.keep[row].nonzero().flatten()[:2].tolist()
    ops = drawn.ops.clone()
    ops[row, second] = ops[row, first]
    with pytest.raises(ValueError, match=r"kept actions\.ops must be distinct"):
        policy.log_prob(drawn._replace(ops=ops))
