"""SplitPolicy: learn which parts of a data set to draw from (the paper's toy experiment)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler

from ola_augment.logits import LogitsModule, zero_logits
from ola_augment.streams import rank_here, stream_of


class SplitActions(NamedTuple):
    """Which split each of B examples was drawn from.

    Attributes:
        splits: (B,) int64.
        log_prob: (B,) log-probability of the split when it was drawn (no grad).

    Example:
        >>> SplitActions(splits=torch.tensor([0, 2]), log_prob=torch.zeros(2)).splits
        tensor([0, 2])
    """

    splits: Tensor
    log_prob: Tensor


class SplitPolicy(LogitsModule):
    """A distribution over the splits of a data set; uniform at the start.

    Inverted, p(s)_i = (1 - softmax(s)_i) / (S - 1): tends to leave one split out. Otherwise
    p(s) = softmax(s): tends to pick one.

    Args:
        num_splits: S, at least 2.
        inverted: use the inverted softmax.

    Attributes:
        logits: (S,) s, on the CPU and in shared memory; no parameter of a model that holds the
            policy.

    Raises:
        ValueError: fewer than 2 splits.

    Example:
        >>> SplitPolicy(num_splits=3).logits.shape
        torch.Size([3])

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
    """

    def __init__(self, num_splits: int, *, inverted: bool = True) -> None:
        super().__init__()
        if num_splits < 2:
            raise ValueError(f"num_splits must be at least 2, got {num_splits}")
        self.inverted = inverted
        self.logits = zero_logits(num_splits)

    def arguments(self) -> dict[str, Any]:
        """Arguments that make such a policy again, for files.

        Returns:
            Argument name -> JSON value.
        """
        return {"num_splits": len(self.logits), "inverted": self.inverted}

    def extra_repr(self) -> str:
        """How much of each split is used.

        Returns:
            The text between the parentheses of ``repr(policy)``.
        """
        usage = ", ".join(f"{used:.2f}" for used in self.usage().tolist())
        return f"inverted={self.inverted}, usage=[{usage}]"

    def log_usage(self) -> Tensor:
        """Log of 1 - softmax(s)_i, or of softmax(s)_i when not inverted.

        In log space: in float32 a softmax that rounds to 1 would make 1 - softmax 0 or negative.

        Returns:
            (S,), differentiable in the logits.
        """
        log_softmax = F.log_softmax(self.logits.clone(), dim=0)  # workers see it change
        if not self.inverted:
            return log_softmax
        others = torch.eye(len(self.logits), dtype=torch.bool, device=self.logits.device)
        return log_softmax.expand(len(others), -1).masked_fill(others, -torch.inf).logsumexp(1)

    def usage(self) -> Tensor:
        """How much of each split is used: the exponential of :meth:`log_usage` (Figure 2).

        Returns:
            (S,) in [0, 1], no grad.
        """
        return self.log_usage().detach().exp()

    def log_probs(self) -> Tensor:
        """Log-probability of drawing an example from each split.

        Returns:
            (S,), differentiable in the logits.
        """
        return F.log_softmax(self.log_usage(), dim=0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> SplitActions:
        """Draw the splits of n examples, on the CPU.

        Args:
            n: number of examples, 0 or more.
            generator: a CPU generator; None uses torch's global one.

        Returns:
            The splits of n examples, with their ``log_prob`` and no gradient.

        Raises:
            ValueError: n below 0.
        """
        if n < 0:
            raise ValueError(f"n must be 0 or more, got {n}")
        with torch.no_grad():
            log_probs = self.log_probs().cpu()
            splits = torch.empty(0, dtype=torch.int64, device="cpu")
            if n:
                splits = torch.multinomial(log_probs.exp(), n, True, generator=generator)
        return SplitActions(splits, log_probs[splits])

    def log_prob(self, actions: SplitActions) -> Tensor:
        """Log-probability of the splits under today's logits.

        Args:
            actions: of B examples.

        Returns:
            (B,), differentiable in the logits.

        Raises:
            ValueError: a split that the policy does not have.
        """
        splits = actions.splits
        if len(splits) and not 0 <= int(splits.min()) <= int(splits.max()) < len(self.logits):
            raise ValueError(
                f"actions.splits must lie in 0 .. {len(self.logits) - 1}, got "
                f"{int(splits.min())} .. {int(splits.max())}"
            )
        return self.log_probs()[splits.to(self.logits.device)]

    def entropy(self) -> Tensor:
        """Entropy of the distribution, differentiable in the logits.

        Returns:
            A scalar in nats, 0 .. log S.
        """
        log_probs = self.log_probs()
        return -(log_probs.exp() * log_probs).sum()


class SplitBatchSampler(Sampler[list[int]]):
    """Batches of data-set indices drawn through a :class:`SplitPolicy`, for any DataLoader.

    For every example a split is drawn from the policy, then an index uniformly from the split; by
    each rank of ``torch.distributed`` anew.

    Args:
        policy: over ``len(splits)`` splits.
        splits: the data-set indices of each split, none empty, no index in two splits.
        batch_size: examples of a batch.
        num_batches: batches of one pass.
        generator: a CPU generator; None uses torch's global one.

    Raises:
        ValueError: a number of splits other than the policy's, an empty split, an index that
            occurs twice, or a batch size or number of batches below 1.

    Example:
        >>> sampler = SplitBatchSampler(SplitPolicy(2), [[0, 1], [2, 3]], 4, num_batches=1)
        >>> indices = next(iter(sampler))
        >>> sampler.actions(indices).splits.shape
        torch.Size([4])
    """

    def __init__(
        self,
        policy: SplitPolicy,
        splits: Sequence[Sequence[int] | Tensor],
        batch_size: int,
        num_batches: int,
        generator: torch.Generator | None = None,
    ) -> None:
        if len(splits) != len(policy.logits):
            raise ValueError(f"the policy has {len(policy.logits)} splits, got {len(splits)}")
        if batch_size < 1 or num_batches < 1:
            raise ValueError(
                "batch_size and num_batches must be at least 1, got "
                f"batch_size={batch_size}, num_batches={num_batches}"
            )
        self.splits = [torch.as_tensor(split, dtype=torch.int64, device="cpu") for split in splits]
        sizes = [len(split) for split in self.splits]
        if min(sizes) == 0:
            raise ValueError(f"every split needs an example, got splits of {sizes}")
        indices = torch.cat(self.splits)
        self._split_of = dict(
            zip(
                indices.tolist(),
                torch.repeat_interleave(torch.tensor(sizes, device="cpu")).tolist(),
                strict=True,
            )
        )
        if len(self._split_of) < len(indices):
            raise ValueError("splits must not share an index: its split would be unknown")
        self.policy = policy
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.generator = generator

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.num_batches):
            generator = stream_of(self.generator, rank_here())
            splits = self.policy.sample(self.batch_size, generator).splits
            uniforms = torch.rand(
                len(splits), dtype=torch.float64, generator=generator, device="cpu"
            )
            yield [
                int(self.splits[split][int(u * len(self.splits[split]))])
                for split, u in zip(splits.tolist(), uniforms.tolist(), strict=True)
            ]

    def actions(self, indices: Sequence[int] | Tensor) -> SplitActions:
        """Splits of a batch of data-set indices, with their log-probability under today's logits.

        Args:
            indices: B indices of the data set, as the sampler gave them.

        Returns:
            The splits of B examples, in the order of the indices.

        Raises:
            ValueError: an index that is in no split.
        """
        wanted = [int(index) for index in indices]
        if unknown := [index for index in wanted if index not in self._split_of]:
            raise ValueError(f"indices in no split: {unknown[:5]}")
        splits = torch.tensor(
            [self._split_of[index] for index in wanted], dtype=torch.int64, device="cpu"
        )
        with torch.no_grad():
            return SplitActions(splits, self.policy.log_probs().cpu()[splits])
