"""SplitPolicy and its sampler."""

import pytest
import torch
from scipy.stats import chisquare
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import SplitBatchSampler, SplitPolicy


@pytest.mark.parametrize("inverted", [True, False])
def test_probabilities_are_the_inverted_softmax(inverted):
    policy = SplitPolicy(4, inverted=inverted).double()
    with torch.no_grad():
        policy.logits.copy_(torch.tensor([0.3, -1.0, 2.0, 0.0]))
    usage = policy.logits.detach().softmax(0)
    usage = 1 - usage if inverted else usage
    torch.testing.assert_close(policy.usage(), usage)
    torch.testing.assert_close(policy.log_probs().detach().exp(), usage / usage.sum())


@pytest.mark.parametrize("extreme", [50.0, 1000.0, 1e30])
def test_usage_is_never_negative_at_the_extremes(extreme):
    policy = SplitPolicy(3)
    with torch.no_grad():
        policy.logits[1] = extreme
    usage, log_probs = policy.usage(), policy.log_probs()
    assert usage.min() >= 0
    torch.testing.assert_close(usage, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(log_probs.detach().exp(), torch.tensor([0.5, 0.0, 0.5]))
    log_probs[0].backward()
    assert policy.logits.grad.isfinite().all()


def test_frequencies_gradient_and_entropy():
    policy = SplitPolicy(3)
    with torch.no_grad():
        policy.logits.copy_(torch.tensor([1.0, 0.0, -0.5]))
    drawn = policy.sample(10_000, torch.Generator().manual_seed(0))
    probs = policy.log_probs().detach().exp().double()
    counts = torch.bincount(drawn.splits, minlength=3)
    assert chisquare(counts, 10_000 * probs / probs.sum()).pvalue > 1e-3
    torch.testing.assert_close(drawn.log_prob, policy.log_prob(drawn).detach())
    torch.testing.assert_close(
        policy.entropy().detach(), torch.distributions.Categorical(probs.float()).entropy()
    )
    assert policy.sample(0).splits.shape == (0,)


def test_sampler_feeds_any_loader_and_knows_its_splits():
    policy = SplitPolicy(2)
    with torch.no_grad():
        policy.logits[1] = 1e4
    values = torch.arange(6)
    sampler = SplitBatchSampler(
        policy, [[0, 2, 4], [1, 3, 5]], 8, 5, torch.Generator().manual_seed(0)
    )
    batches = [batch for (batch,) in DataLoader(TensorDataset(values), batch_sampler=sampler)]
    assert len(batches) == len(sampler) == 5
    drawn = torch.cat(batches)
    assert set(drawn.tolist()) == {0, 2, 4}
    assert sampler.actions(drawn).splits.tolist() == [0] * 40
    assert sampler.actions([1, 0]).splits.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"no split: \[9\]"):
        sampler.actions([9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0], [1], [2]], 1, 1), "2 splits, got 3"),
        (([[0], []], 1, 1), r"splits of \[1, 0\]"),
        (([[0, 1], [1]], 1, 1), "share an index"),
        (([[0], [1]], 0, 1), "batch_size=0"),
    ],
)
def test_bad_samplers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SplitBatchSampler(SplitPolicy(2), *arguments)


def test_bad_policies_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        SplitPolicy(1)
    drawn = SplitPolicy(9).sample(200, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        SplitPolicy(2).log_prob(drawn)
