"""Images of a transform: what they may be, and how what was drawn is applied to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode

from ola_augment.actions import Actions
from ola_augment.kernels.pixel_format import (
    PixelFormat,
    ValueRange,
    as_grey_weights,
    as_value_range,
    pixel_format,
)
from ola_augment.operations.apply import run_actions, run_steps, slots_of
from ola_augment.operations.checks import (
    as_interpolation,
    check_channels,
    check_scale,
    fill_per_channel,
    is_bilinear,
)
from ola_augment.operations.executors import is_fastest_in_pillow
from ola_augment.operations.executors.compiled import run_on_array
from ola_augment.operations.executors.pillow import run_on_image
from ola_augment.operations.program import Slots, program_of_one, steps_of_one
from ola_augment.operations.steps import Rendering
from ola_augment.policy import Policy
from ola_augment.space import SearchSpace
from ola_augment.transforms.drawing import Drawing
from ola_augment.transforms.inputs import (
    Fills,
    as_fills,
    check_picture,
    fill_of,
    layout,
    plain_fill,
    restore,
    to_tensor,
)
from ola_augment.transforms.one import (
    as_image,
    as_pixels,
    from_image,
    from_pixels,
    is_one_for_pillow,
    kind_of_one,
)


class Applying(Drawing):
    """A transform that applies what it drew; as :class:`PolicyTransform` describes it."""

    _fixed = frozenset(("interpolation", "fill", "value_range", "grey_weights"))

    def __init__(
        self,
        policy: Policy,
        *,
        interpolation: InterpolationMode | str | int = InterpolationMode.NEAREST,
        fill: Fills = None,
        generator: torch.Generator | None = None,
        value_range: ValueRange | None = None,
        grey_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(policy, generator)
        self.interpolation = as_interpolation(interpolation)
        self._bilinear = is_bilinear(interpolation)
        self.value_range = as_value_range(value_range)
        self.grey_weights = as_grey_weights(grey_weights)
        self._fills = as_fills(fill, self.value_range)
        self.fill = plain_fill(fill)
        self._checked_on_device = False
        self._seen: dict[tuple[Any, ...], _Seen] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_seen": {}}

    @property
    def _mask_fill(self) -> float:
        return self._fills.get(tv_tensors.Mask, (0,))[0]

    def _check(self, picture: Any) -> None:
        check_picture(picture)
        pixels = self._pixels(picture)
        check_channels(self.space, pixels.colors)
        fill_per_channel(fill_of(self._fills, picture), pixels)

    def range_of(self, images: Tensor) -> float:
        """Between black and white of images: 255 for uint8, 1 for floats, or ``value_range``'s.

        Args:
            images: (..., C, H, W), of a dtype that the transform takes.

        Returns:
            White less black, in levels.
        """
        pixels = self._pixels(images)
        return float(pixels.high - pixels.low)

    def _pixels(self, picture: Any) -> PixelFormat:
        """What a picture is, which passed its check."""
        _, channels, _, dtype, alpha = layout(picture)
        return pixel_format(dtype, channels, self.value_range, self.grey_weights, alpha)

    def _rendering(self, picture: Any) -> Rendering:
        pixels = self._pixels(picture)
        fill = fill_per_channel(fill_of(self._fills, picture), pixels)
        return Rendering(fill, self._bilinear, pixels)

    def _check_scale(self, pictures: Sequence[Any]) -> None:
        """Look at the values of the pictures of one batch, unless no operation is ever applied."""
        floats = [picture for picture in pictures if not layout(picture).whole]
        if not floats:
            return
        tensors = [to_tensor(picture) for picture in floats]
        # Looking at the values of an accelerator's images waits for them: once must do.
        on_device = any(tensor.device.type != "cpu" for tensor in tensors)
        if on_device and self._checked_on_device:
            return
        try:
            check_scale(tensors, self._pixels(floats[0]))
        except ValueError:
            with torch.no_grad():
                if float(self.policy.applied_ops()) > 0:
                    raise
        self._checked_on_device = self._checked_on_device or on_device

    def _look_at(self, picture: Any) -> _Seen:
        """Check an image of bytes, whose values cannot be wrong; the next like it only by kind."""
        kind = kind_of_one(picture)
        seen = self._seen.get(kind)
        if seen is None or seen.space is not self.space:
            self._check(picture)
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            seen = _Seen(self.space, self._rendering(picture), *layout(picture).size)
            self._seen[kind] = seen
        return seen

    def _is_for_pillow(self, sample: Any) -> bool:
        of_bytes = self.value_range in (None, (0, 255)) and self.grey_weights is None
        return of_bytes and is_one_for_pillow(sample)

    def _apply_actions(self, picture: Any, actions: Actions) -> Any:
        """Apply as many actions to a picture as it has images, or clips."""
        rendering = self._rendering(picture)
        if isinstance(picture, PIL.Image.Image) and rendering.pixels.of_pillow:
            return self._run_one(picture, slots_of(actions))
        images = to_tensor(picture)
        count, draws = math.prod(images.shape[:-3]), actions.batch_size
        if count != draws:
            frames = torch.arange(draws, device="cpu").repeat_interleave(count // draws)
            actions = actions.select(frames)
        flat = images.reshape(count, *images.shape[-3:])
        out = run_actions(flat, self.space, actions, rendering)
        return restore(out.reshape(images.shape), picture)

    def _run_one(self, picture: Any, slots: Slots, seen: _Seen | None = None) -> Any:
        """Apply what was drawn to one grey or colour image of bytes on the CPU."""
        space, rendering, height, width = seen or self._look_at(picture)
        steps = steps_of_one(space, slots, height, width)
        of_pil = isinstance(picture, PIL.Image.Image)
        laid_out = not isinstance(picture, Tensor) or picture.is_contiguous()
        if laid_out and is_fastest_in_pillow(steps, height, width, of_pil):
            return from_image(run_on_image(as_image(picture), steps, rendering), picture)
        alone = program_of_one(steps, height, width)
        if isinstance(picture, Tensor) or alone.program.has_batched:
            return restore(run_steps(to_tensor(picture)[None], alone, rendering)[0], picture)
        return from_pixels(run_on_array(as_pixels(picture), alone, rendering), picture)


#: Kinds of images of which a transform remembers what it found out.
_MOST_SEEN = 256


class _Seen(NamedTuple):
    """What is known of all images of one kind and size."""

    space: SearchSpace
    rendering: Rendering
    height: int
    width: int
