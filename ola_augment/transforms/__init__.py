"""torchvision's face of a policy: transforms over images, videos, masks, boxes and key points."""

from ola_augment.transforms.base import PolicyTransform
from ola_augment.transforms.methods import OLAAugment, RandAugment, TrivialAugment, UniformAugment

__all__ = ["OLAAugment", "PolicyTransform", "RandAugment", "TrivialAugment", "UniformAugment"]
