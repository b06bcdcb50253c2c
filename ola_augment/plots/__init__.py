"""Pictures of a policy, of how it moved, and of what it does to images (needs matplotlib).

All of them return a matplotlib ``Figure``; colours are safe for the colour-blind.
"""

from ola_augment.plots.mixture import split_usage
from ola_augment.plots.policies import policy_over_time, policy_tables
from ola_augment.plots.samples import augmented_samples, describe, sample_strip

__all__ = [
    "augmented_samples",
    "describe",
    "policy_over_time",
    "policy_tables",
    "sample_strip",
    "split_usage",
]
