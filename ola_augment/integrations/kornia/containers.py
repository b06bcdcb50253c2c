"""Our transforms in kornia's containers."""

from __future__ import annotations

from typing import Any

import kornia.augmentation as K
import torch
from kornia.constants import Resample
from kornia.geometry.transform import warp_affine
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from ola_augment.actions import Actions
from ola_augment.operations import apply_geometry_to_masks, transform_points
from ola_augment.transforms import PolicyTransform

Params = dict[str, Tensor]


class PolicyAugmentation(K.GeometricAugmentationBase2D):
    """A :class:`ola_augment.PolicyTransform` as a kornia augmentation.

    For ``AugmentationSequential``, whose ``data_keys`` (masks, boxes, key points) it moves in
    register with the image, ``ImageSequential`` and the other containers, or by itself. Its random
    parameters are the actions: what a container records replays them, image by image, and
    :attr:`last_actions` gives them to an updater. Images are floating in [0, 1] as kornia wants
    them, with ``fill`` in that scale.

    ``inverse`` undoes what moved pixels, as far as they are still there, and leaves colours.

    Args:
        augment: any of our transforms; not copied, so that its policy can be trained.
        same_on_batch: one draw for all images of a batch.
        keepdim: give back images without a batch dimension as they came.

    Raises:
        TypeError: ``augment`` is no such transform.

    Example:
        >>> from ola_augment import OLAAugment
        >>> augment = PolicyAugmentation(OLAAugment("rand_augment"))
        >>> sequence = K.AugmentationSequential(augment, data_keys=["input", "mask"])
        >>> image, mask = sequence(torch.rand(2, 3, 8, 8), torch.ones(2, 1, 8, 8))
        >>> augment.last_actions.batch_size
        2
    """

    # Matrices are read by annotations only, and unknown for a user's own kernels.
    _compute_matrix_lazily = True

    def __init__(
        self, augment: PolicyTransform, *, same_on_batch: bool = False, keepdim: bool = False
    ) -> None:
        if not isinstance(augment, PolicyTransform):
            raise TypeError(f"augment must be a PolicyTransform, got {type(augment).__name__}")
        super().__init__(p=1.0, same_on_batch=same_on_batch, keepdim=keepdim)
        self.augment = augment
        bilinear = augment.interpolation is InterpolationMode.BILINEAR
        self.flags = {"resample": Resample.BILINEAR if bilinear else Resample.NEAREST}

    @property
    def last_actions(self) -> Actions | None:
        """What the latest call drew or replayed, or None."""
        return _actions(self._params) if self._params else None

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw :class:`ola_augment.Actions`, a parameter for each field.

        Args:
            batch_shape: (B, C, H, W) of the images.

        Returns:
            The fields by name, on the CPU.
        """
        batch = batch_shape[0]
        actions = self.augment._sample(1 if self.same_on_batch and batch else batch)
        if self.same_on_batch and batch:
            actions = actions.select([0] * batch)
        return actions._asdict()

    def compute_transformation(self, input: Tensor, params: Params, flags: Any) -> Tensor:
        """Matrices from the image to the result, pixel centres at whole numbers.

        Args:
            input: the images (B, C, H, W).
            params: of :meth:`generate_parameters`.
            flags: kornia's, not read.

        Returns:
            (B, 3, 3), of the dtype and device of ``input``.

        Raises:
            ValueError: the actions hold a user's own kernel whose geometry is unknown.
        """
        actions = _actions(params)
        # Where these three points go, half a pixel from kornia's, determines the matrix.
        corners = torch.tensor(
            [[0.5, 0.5], [1.5, 0.5], [0.5, 1.5]], dtype=torch.float64, device="cpu"
        )
        points = corners.expand(actions.batch_size, 3, 2)
        try:
            moved = transform_points(points, self.augment.space, actions, *input.shape[-2:])
        except ValueError as error:
            raise ValueError(
                f"{error}; for images alone use ImageSequential, or AugmentationSequential with "
                "transformation_matrix_mode='skip'"
            ) from None
        origin, x, y = (moved - 0.5).unbind(1)
        matrices = torch.eye(3, dtype=torch.float64, device="cpu").repeat(len(moved), 1, 1)
        matrices[:, :2] = torch.stack((x - origin, y - origin, origin), -1)
        return matrices.to(input)

    def apply_transform(
        self, input: Tensor, params: Params, flags: Any, transform: Tensor | None = None
    ) -> Tensor:
        """Apply what was drawn to images.

        Args:
            input: (B, C, H, W) floating in [0, 1].
            params: of :meth:`generate_parameters`.
            flags: kornia's, not read.
            transform: the matrices, not read.

        Returns:
            A new tensor of the shape and dtype of ``input``.
        """
        return self.augment.replay(input, _actions(params))

    def apply_transform_mask(
        self, input: Tensor, params: Params, flags: Any, transform: Tensor | None = None
    ) -> Tensor:
        """Move masks with their images: nearest pixel, 0 outside.

        Args:
            input: (B, C, H, W), of any dtype.
            params: of :meth:`generate_parameters`.
            flags: kornia's, not read.
            transform: the matrices, not read.

        Returns:
            A new tensor of the shape and dtype of ``input``.
        """
        return apply_geometry_to_masks(input, self.augment.space, _actions(params))

    def inverse_transform(
        self,
        input: Tensor,
        flags: dict[str, Any],
        transform: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Move pixels back by the inverse of the matrix.

        Args:
            input: (B, C, H, W) floating.
            flags: kornia's; ``resample`` says how.
            transform: (B, 3, 3), of the inverse.
            size: height and width of the result; None is that of ``input``.

        Returns:
            (B, C, height, width).
        """
        assert transform is not None
        mode = flags["resample"].name.lower()
        height, width = size or input.shape[-2:]
        back = transform[:, :2].to(input)
        return warp_affine(input, back, (height, width), mode, align_corners=True)


def _actions(params: Params) -> Actions:
    return Actions(*(params[field].cpu() for field in Actions._fields))
