"""FSDP2 (``torch.distributed.fsdp.fully_shard``): the forms that can be aligned, and how.

Every process keeps a shard of each parameter, a DTensor that is in no graph. Around the forward
and the backward pass of each module that was given to ``fully_shard`` its *group* of parameters is
whole: one tensor each, the same object for life, whose memory comes and goes. What is private in
FSDP2 is in this room, and nowhere else.
"""

from ola_augment.alignment._fsdp.forms import (
    is_machinery,
    is_shard,
    is_sharded,
    left_alone,
    refusal,
    shards_of,
)
from ola_augment.alignment._fsdp.passes import Sharded, is_custom, unnoticed
from ola_augment.alignment._fsdp.reference import Along
from ola_augment.alignment._fsdp.shards import (
    at_rest,
    averaged_gradients,
    own_part,
    to_shard,
    to_whole,
)

__all__ = [
    "Along",
    "Sharded",
    "at_rest",
    "averaged_gradients",
    "is_custom",
    "is_machinery",
    "is_shard",
    "is_sharded",
    "left_alone",
    "own_part",
    "refusal",
    "shards_of",
    "to_shard",
    "to_whole",
    "unnoticed",
]
