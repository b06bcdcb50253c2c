"""Policies: distributions over the augmentations of one image (Algorithms 2 and 3)."""

from ola_augment.draw import LogProbs
from ola_augment.policy.attributes import FixedAttributes
from ola_augment.policy.base import Policy, depends_on_logits_alone
from ola_augment.policy.fixed import RandAugmentPolicy, UniformPolicy
from ola_augment.policy.learned import OLAPolicy, check_strength

__all__ = [
    "FixedAttributes",
    "LogProbs",
    "OLAPolicy",
    "Policy",
    "RandAugmentPolicy",
    "UniformPolicy",
    "check_strength",
    "depends_on_logits_alone",
]
