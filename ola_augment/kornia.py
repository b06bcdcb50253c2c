"""kornia's augmentations as operations that are learned, our transforms in kornia's containers.

Needs kornia: ``pip install ola_augment[kornia]``.
"""

from ola_augment.integrations.kornia import PolicyAugmentation, operation, search_space

__all__ = ["PolicyAugmentation", "operation", "search_space"]
