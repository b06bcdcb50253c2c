"""Property tests for image augmentations, with hypothesis: for ours and for your own.

Needs hypothesis: ``pip install ola_augment[testing]``.
"""

from ola_augment.extras import needs

with needs("testing"):
    from ola_augment.testing.checks import check_transform
    from ola_augment.testing.properties import CHECKS
    from ola_augment.testing.strategies import LAYOUTS, actions, images, policies, spaces

__all__ = ["CHECKS", "LAYOUTS", "actions", "check_transform", "images", "policies", "spaces"]
