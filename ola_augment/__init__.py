"""Image augmentation that finds out, early in a run, which operations help, and uses those."""

from typing import TYPE_CHECKING, Any

from ola_augment.actions import Actions
from ola_augment.alignment import DirectionalAlignment, GradientAlignment
from ola_augment.draw import LogProbs
from ola_augment.files import load_policy, save_policy
from ola_augment.operation import Operation
from ola_augment.policy import OLAPolicy, Policy, RandAugmentPolicy, UniformPolicy
from ola_augment.space import SearchSpace
from ola_augment.training.learner import OLALearner
from ola_augment.training.meta_gradient import MetaGradientUpdater
from ola_augment.training.policy_gradient import UpdateStats
from ola_augment.training.split import SplitActions, SplitBatchSampler, SplitPolicy
from ola_augment.training.thermostat import Thermostat
from ola_augment.training.updater import GARUpdater, NSLRUpdater
from ola_augment.training.values import ValueUpdater
from ola_augment.transforms import (
    OLAAugment,
    PolicyTransform,
    RandAugment,
    TrivialAugment,
    UniformAugment,
)

if TYPE_CHECKING:
    from ola_augment.alignment import BackPACKAlignment

__version__ = "0.1.0"

__all__ = [
    "Actions",
    "BackPACKAlignment",
    "DirectionalAlignment",
    "GARUpdater",
    "GradientAlignment",
    "LogProbs",
    "MetaGradientUpdater",
    "NSLRUpdater",
    "OLAAugment",
    "OLALearner",
    "OLAPolicy",
    "Operation",
    "Policy",
    "PolicyTransform",
    "RandAugment",
    "RandAugmentPolicy",
    "SearchSpace",
    "SplitActions",
    "SplitBatchSampler",
    "SplitPolicy",
    "Thermostat",
    "TrivialAugment",
    "UniformAugment",
    "UniformPolicy",
    "UpdateStats",
    "ValueUpdater",
    "load_policy",
    "save_policy",
]


def __getattr__(name: str) -> Any:
    """BackPACK is imported by who uses it, not by who imports the package."""
    if name == "BackPACKAlignment":
        from ola_augment.alignment import BackPACKAlignment

        return BackPACKAlignment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
