"""Images of which augmentation leaves nothing to see: they stay as they were."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.policy import Policy
from ola_augment.transforms import PolicyTransform

#: Standard deviation below which an image is flat: 8 of 255 grey levels.
FLAT = 8 / 255
#: Pixels that are looked at lie so far apart, so that this costs next to nothing at large sizes.
_SAMPLED = 64
#: Images before the share of flat ones is worth a word.
_ENOUGH_TO_TELL = 200


class FlatImages:
    """Counts the images that stay as they were, and says so where there are many.

    Attributes:
        augmented: images that were looked at.
        flat: of them, those of which augmentation left nothing to see.
    """

    def __init__(self) -> None:
        self.augmented = 0
        self.flat = 0
        self._told = False

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"augmented": self.augmented, "flat": self.flat}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self.augmented, self.flat = state["augmented"], state["flat"]

    def spare(
        self, before: Tensor, after: Tensor, actions: Actions, transform: PolicyTransform
    ) -> tuple[Tensor, Actions]:
        """Undo the augmentation of images that it made flat, where each image has a draw.

        Args:
            before: (B, ..., C, H, W) images.
            after: the same, augmented.
            actions: of them.
            transform: that augmented.

        Returns:
            Images and actions.
        """
        if len(actions.keep) != len(before):
            return after, actions
        top = transform.range_of(before)
        after, actions, count = spare_flat(before, after, actions, transform.policy, top)
        self.flat += count
        self.augmented += len(before)
        rare = 10 * self.flat < self.augmented
        if not (rare or self._told or self.augmented < _ENOUGH_TO_TELL):
            self._told = True
            warnings.warn(
                f"augmentation made {100 * self.flat / self.augmented:.0f} % of the images flat "
                "(less than 8 of 255 levels of standard deviation); they were left as they are: "
                "take a space of smaller magnitudes, or images of more contrast",
                stacklevel=3,
            )
        return after, actions


def spare_flat(
    before: Tensor, after: Tensor, actions: Actions, policy: Policy, top: float
) -> tuple[Tensor, Actions, int]:
    """Undo the augmentation of images that it made flat.

    Args:
        before: (B, ..., C, H, W) images.
        after: the same, augmented.
        actions: of the B examples.
        policy: that drew them.
        top: range of the levels: 255 for uint8, 1 for floats, or that of ``value_range``.

    Returns:
        The images with the flat ones as they were, the actions with nothing kept for these, and
        how many there were.
    """
    if not len(before) or not actions.keep.any():
        return after, actions, 0
    least = FLAT * top
    flat = (_spread(after) < least) & (_spread(before) >= least)
    count = int(flat.sum())
    if not count:
        return after, actions, 0
    after = torch.where(flat.view(-1, *(1,) * (after.dim() - 1)), before, after)
    return after, nothing_applied(actions, flat, policy), count


def nothing_applied(actions: Actions, where: Tensor, policy: Policy) -> Actions:
    """Actions of which some examples count as ones for which every operation was dropped.

    Args:
        actions: of B examples.
        where: (B,) bool, those examples.
        policy: that drew the actions.

    Returns:
        New actions; where nothing is kept, with the log-probability that this has today (what the
        policy never does keeps that of the draw, since no example may have one of -inf).
    """
    where = where.to(actions.keep.device)
    kept = actions.keep & ~where[:, None]
    changed = actions._replace(
        keep=kept,
        magnitude_bins=torch.where(kept, actions.magnitude_bins, 0),
        signs=torch.where(kept, actions.signs, 1),
        centers=actions.centers * kept[..., None],
    )
    with torch.no_grad():
        today = policy.log_prob(changed).to(actions.log_prob)
    log_prob = torch.where(where & today.isfinite(), today, actions.log_prob)
    return changed._replace(log_prob=log_prob)


def _spread(images: Tensor) -> Tensor:
    """(B,), standard deviation of some of each image's values."""
    height, width = images.shape[-2:]
    rows, columns = max(1, height // _SAMPLED), max(1, width // _SAMPLED)
    sampled = images[..., ::rows, ::columns].reshape(len(images), -1)
    return sampled.float().std(dim=1, correction=0)
