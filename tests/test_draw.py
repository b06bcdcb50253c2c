"""Drawing: one image and a batch, kept tables, and what changes them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ola_augment import LogProbs, OLAPolicy, Policy, RandAugmentPolicy, UniformPolicy
from ola_augment.draw import _search_rows, draw_one


def learned(max_ops=4, seed=0, scale=2.0, dtype=torch.float32, strength=None):
    policy = OLAPolicy("wide_long", max_ops, strength=strength)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logits in [policy.keep_logits, policy.magnitude_logits]:
            logits.copy_(scale * torch.randn(logits.shape, generator=generator))
    return policy.to(dtype)


POLICIES = {
    "ola": learned(),
    "ola, float64": learned(dtype=torch.float64),
    "ola, every operation": learned(19, seed=1),
    "ola, certain": learned(scale=200.0, seed=2),
    "ola of a strength": learned(strength=2.5),
    "uniform": UniformPolicy(),
    "uniform, 7 bins": UniformPolicy("rand_augment", 3, 0.7, 7),
    "trivial": UniformPolicy("wide_long", 1, 1.0),
    "never kept": UniformPolicy(keep_prob=0.0),
    "rand": RandAugmentPolicy(),
    "rand, 20 operations": RandAugmentPolicy(num_ops=20, magnitude=30),
    "rand, none": RandAugmentPolicy(num_ops=0),
}


@pytest.mark.parametrize("name", POLICIES)
def test_one_image_is_drawn_as_in_a_batch(name):
    policy = POLICIES[name]
    drawn = policy.sample(300, torch.Generator().manual_seed(0))
    uniforms = torch.rand(
        300, 1 + 6 * policy.max_ops, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    scalars = policy._drawn_from().scalars
    for i, row in enumerate(uniforms.tolist()):
        one, expected = draw_one(row, scalars).actions(), drawn.select(i)
        for field, value, same in zip(drawn._fields, one, expected, strict=True):
            assert torch.equal(value, same), (field, i)
            assert value.dtype == same.dtype
            assert value.shape == same.shape


@pytest.mark.parametrize("name", POLICIES)
def test_recorded_log_prob_of_one_is_that_of_the_actions(name):
    policy = POLICIES[name]
    for seed in range(20):
        drawn = policy.sample(1, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn.log_prob, policy.log_prob(drawn).detach())


@given(st.integers(2, 70), st.integers(1, 5), st.integers(0, 2**32))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_rows_are_searched_as_numpy_does(bins, size, seed):
    generator = np.random.default_rng(seed)
    weights = generator.random((size, bins)) * (generator.random((size, bins)) < 0.6)
    weights[:, generator.integers(bins)] += 0.1
    cdf = weights.cumsum(1)
    cdf /= cdf[:, -1:]
    rows = generator.integers(0, size, 50)
    values = np.where(generator.random(50) < 0.5, generator.random(50), cdf[rows, 0] * 0.999)
    expected = [np.searchsorted(cdf[r], v, side="right") for r, v in zip(rows, values, strict=True)]
    assert _search_rows(cdf, rows, values).tolist() == expected


def test_tables_are_kept_until_the_logits_change():
    policy = learned()
    first = policy._drawn_from()
    assert policy._drawn_from() is first
    with torch.no_grad():
        policy.keep_logits.fill_(-50)
    assert not policy.sample(1).keep.any()
    policy.double()
    assert policy.sample(1).log_prob.dtype == torch.float64
    values = {name: torch.full_like(value, 50) for name, value in policy.state_dict().items()}
    policy.load_state_dict(values)
    drawn = policy.sample(50)
    assert (drawn.keep.sum(1) == drawn.num_ops).all()


def test_logits_written_by_another_process_are_seen():
    policy = learned()
    policy.sample(1)
    context = torch.multiprocessing.get_context("fork")
    process = context.Process(target=_never_keep, args=(policy,))
    process.start()
    process.join()
    assert not policy.sample(1).keep.any()


def test_a_changed_strength_is_seen():
    policy = learned(strength=4.0)
    drawn = policy.sample(1)
    assert set(drawn.ops[drawn.keep].tolist()) == set(drawn.ops.flatten().tolist())  # each once
    policy.strength = 0.0
    assert not policy.sample(1).keep.any()


def _never_keep(policy):
    with torch.no_grad():
        policy.keep_logits.fill_(-50)


def test_a_policy_of_ones_own_is_asked_for_every_draw():
    class Schedule(Policy):
        calls = 0

        def log_probs(self):
            self.calls += 1
            tables = UniformPolicy("rand_augment", 1).log_probs()
            size = len(self.space)
            certain, never = torch.zeros(size), torch.full((size,), -torch.inf)
            keep, drop = (certain, never) if self.calls > 1 else (never, certain)
            return LogProbs(tables.num_ops, keep, drop, tables.magnitude)

    class Overridden(UniformPolicy):
        log_probs = Schedule.log_probs
        calls = 0

    for policy in (Schedule("rand_augment", 1), Overridden("rand_augment", 1)):
        assert [bool(policy.sample(1).keep) for _ in range(3)] == [False, True, True]


def test_kept_tables_do_not_travel():
    policy = learned()
    size = len(pickle.dumps(policy))
    policy.sample(1)
    assert len(pickle.dumps(policy)) == size
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.keep_logits.fill_(-50)
    assert not other.sample(1).keep.any()
    assert policy.sample(100).keep.any()
