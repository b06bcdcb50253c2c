"""kornia: its augmentations as operations, our transforms in its containers."""

from ola_augment.extras import needs

with needs("kornia"):
    from ola_augment.integrations.kornia.containers import PolicyAugmentation
    from ola_augment.integrations.kornia.operations import operation, search_space

__all__ = ["PolicyAugmentation", "operation", "search_space"]
