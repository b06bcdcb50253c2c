"""Learning while training: rewards, updaters, the interleaved loop, mixtures of data sets."""

from ola_augment.training.callbacks import Callback, CSVLogger, TensorBoardLogger
from ola_augment.training.estimates import Contrast, Values
from ola_augment.training.evidence import Evidence, OperationEvidence
from ola_augment.training.fit import fit
from ola_augment.training.learner import OLALearner
from ola_augment.training.meta_gradient import MetaGradientUpdater
from ola_augment.training.metrics import accuracy, policy_metrics, scale_to_float
from ola_augment.training.pair import Step
from ola_augment.training.policy_gradient import UpdateStats
from ola_augment.training.reward import (
    cosine_reward,
    gradient_alignment_reward,
    next_step_loss_reward,
    normalize,
)
from ola_augment.training.split import SplitActions, SplitBatchSampler, SplitPolicy
from ola_augment.training.thermostat import Thermostat
from ola_augment.training.trial import Trial
from ola_augment.training.updater import GARUpdater, NSLRUpdater
from ola_augment.training.values import ValueUpdater

__all__ = [
    "CSVLogger",
    "Callback",
    "Contrast",
    "Evidence",
    "GARUpdater",
    "MetaGradientUpdater",
    "NSLRUpdater",
    "OLALearner",
    "OperationEvidence",
    "SplitActions",
    "SplitBatchSampler",
    "SplitPolicy",
    "Step",
    "TensorBoardLogger",
    "Thermostat",
    "Trial",
    "UpdateStats",
    "ValueUpdater",
    "Values",
    "accuracy",
    "cosine_reward",
    "fit",
    "gradient_alignment_reward",
    "next_step_loss_reward",
    "normalize",
    "policy_metrics",
    "scale_to_float",
]
