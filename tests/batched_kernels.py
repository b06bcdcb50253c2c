"""The batched kernels, called as what was drawn."""

from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.kernels.pixel_format import pixel_format
from ola_augment.operations.executors import batched
from ola_augment.operations.steps import Program, Rendering


def apply_batched(
    images: Tensor, program: Program, actions: Actions, fill: tuple[float, ...], bilinear: bool
) -> Tensor:
    """Images of the whole range of their dtype."""
    pixels = pixel_format(images.dtype, images.shape[1])
    return batched.run(images, program.steps(actions), Rendering(fill, bilinear, pixels))
