"""The proof: is the batch's loss a sum over examples, and did their rows meet anywhere?

A capture sees `Examination` alone, an engine `Proof` and `check_model`.
"""

from ola_augment.alignment.proof.examination import Examination, Proof
from ola_augment.alignment.proof.fingerprints import Decision, Unrelated
from ola_augment.alignment.proof.separation import Located
from ola_augment.alignment.proof.sums import SumCheck
from ola_augment.alignment.proof.validation import check_model, trainable_parameters, unwrapped

__all__ = [
    "Decision",
    "Examination",
    "Located",
    "Proof",
    "SumCheck",
    "Unrelated",
    "check_model",
    "trainable_parameters",
    "unwrapped",
]
