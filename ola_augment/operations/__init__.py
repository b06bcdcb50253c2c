"""The kernels: images in, images out, one operation and magnitude per example."""

from ola_augment.operations.apply import apply_actions, compile_kernels
from ola_augment.operations.geometry import apply_geometry_to_masks, transform_points

__all__ = ["apply_actions", "apply_geometry_to_masks", "compile_kernels", "transform_points"]
