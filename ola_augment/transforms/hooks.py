"""torchvision's hooks of a transform: find the images of a sample, draw for it, apply."""

from __future__ import annotations

import math
from typing import Any

from ola_augment.transforms.annotations import ANNOTATIONS, check_annotation, follow
from ola_augment.transforms.applying import Applying
from ola_augment.transforms.containers import refuse_deaf_containers
from ola_augment.transforms.inputs import image_array, layout
from ola_augment.transforms.samples import refuse_second_picture, refuse_unseen_image


class Hooks(Applying):
    """A transform of samples; as :class:`PolicyTransform` describes it."""

    def _needs_transform_list(self, flat_inputs: list[Any]) -> list[bool]:
        """Which entries are images and annotations (torchvision's hook): arrays can be, too."""
        refuse_second_picture(flat_inputs)
        array = image_array(flat_inputs)
        if array is None:
            needed: list[bool] = super()._needs_transform_list(flat_inputs)
            refuse_unseen_image(flat_inputs, needed)
            return needed
        return [i == array or isinstance(x, ANNOTATIONS) for i, x in enumerate(flat_inputs)]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Check a sample and draw for it (torchvision's hook).

        Args:
            flat_inputs: the images and annotations of the sample.

        Returns:
            ``actions``, the :class:`Actions`, and ``batch``, the batch dimensions of the images.

        Raises:
            TypeError: no image in the sample.
            ValueError: images of different sizes, annotations that do not fit their image, or what
                :meth:`augment` refuses.
        """
        refuse_deaf_containers(self)
        return self._draw(flat_inputs)

    def _draw(self, flat_inputs: list[Any]) -> dict[str, Any]:
        pictures = [entry for entry in flat_inputs if not isinstance(entry, ANNOTATIONS)]
        if not pictures:
            raise TypeError(
                "the input holds no image (PIL, tensor, array (H, W, C), tv_tensors Image or Video)"
            )
        for picture in pictures:
            self._check(picture)
            if not getattr(self._drawn, "scale_is_checked", False):
                self._check_scale([picture])
        shared = layout(pictures[0])
        for picture in pictures[1:]:
            other = layout(picture)
            if (other.batch, other.size) != (shared.batch, shared.size):
                raise ValueError(
                    "all images of a sample must have the same batch size and height and width, "
                    f"got {(*shared.batch, *shared.size)} and {(*other.batch, *other.size)}; a "
                    "list that holds nothing but images may hold any"
                )
        for entry in flat_inputs:
            if isinstance(entry, ANNOTATIONS):
                check_annotation(entry, shared.size, shared.batch, self._mask_fill)
        # Other threads draw at the same time: what was drawn here goes on from hand to hand.
        actions = self._sample(math.prod(shared.batch))
        self._drawn.actions = actions if shared.batch else actions.select(0)
        return {"actions": actions, "batch": shared.batch}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply what was drawn to one entry of a sample (torchvision's hook).

        Args:
            inpt: an image or annotation.
            params: of :meth:`make_params`.

        Returns:
            The entry, augmented or moved; of the same type, shape and dtype.
        """
        actions = params["actions"]
        if isinstance(inpt, ANNOTATIONS):
            return follow(inpt, self.space, actions, len(params["batch"]), self._mask_fill)
        return self._apply_actions(inpt, actions)
