"""The proof: is the batch's loss a sum over examples, and did their rows meet anywhere?

A capture sees `Examination` alone, an engine `Proof` and `check_model`.
"""

from ola_augment.alignment.proof.decisions import Decision, Unrelated
from ola_augment.alignment.proof.examination import Examination
from ola_augment.alignment.proof.known import Proof
from ola_augment.alignment.proof.separation import Located
from ola_augment.alignment.proof.sums import SumCheck
from ola_augment.alignment.proof.validation import (
    all_parameters,
    check_model,
    refuse_sharded,
    trainable_parameters,
    unwrapped,
)

__all__ = [
    "Decision",
    "Examination",
    "Located",
    "Proof",
    "SumCheck",
    "Unrelated",
    "all_parameters",
    "check_model",
    "refuse_sharded",
    "trainable_parameters",
    "unwrapped",
]
