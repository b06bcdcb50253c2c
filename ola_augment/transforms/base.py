"""PolicyTransform: a policy and its operations as a torchvision v2 transform."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from ola_augment.actions import Actions, check_actions
from ola_augment.logits import warn_if_unshared
from ola_augment.operations.apply import run_actions
from ola_augment.policy import FixedAttributes, Policy
from ola_augment.space import SearchSpace
from ola_augment.transforms.annotations import ANNOTATIONS, check_annotation, follow
from ola_augment.transforms.containers import refuse_unseen_annotations
from ola_augment.transforms.inputs import (
    Fill,
    batch_size,
    check_fill,
    check_fill_for,
    check_picture,
)


class PolicyTransform(FixedAttributes, v2.Transform):  # type: ignore[misc]
    """Draws from a policy and applies what it drew; each example of a batch gets its own.

    Called as any torchvision v2 transform: with a PIL image, a tensor (C, H, W) or (B, C, H, W),
    tv_tensors or any nesting of these. Masks, boxes and key points follow their image; everything
    else passes through. A ``Video`` (..., T, C, H, W) gets one draw for a clip.

    Images are uint8, or floating in [0, 1], with 1 or 3 channels. uint8 on the CPU gives Pillow's
    result; a float image k/255 gives that of the uint8 image k within the bounds in the docs.

    Args:
        policy: what to draw from.
        interpolation: ``InterpolationMode.NEAREST`` (Pillow's default) or ``BILINEAR``.
        fill: value outside of the image for rotate, shear and translate, in the scale of the
            images (0 .. 255 for uint8, 0 .. 1 for floats); one number or one per channel. Like
            ``interpolation`` it cannot be changed afterwards.
        generator: a CPU generator to draw with; None uses torch's global one. In a DataLoader
            worker it is replaced by one seeded with it and the worker's own seed.

    Attributes:
        policy: the :class:`Policy`.
        last_actions: :class:`Actions` of the latest call in this process, or None. Without a
            batch dimension if the images had none.
    """

    _fixed = frozenset(("interpolation", "fill"))

    def __init__(
        self,
        policy: Policy,
        *,
        interpolation: InterpolationMode = InterpolationMode.NEAREST,
        fill: Fill = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy, got {type(policy).__name__}")
        modes = (InterpolationMode.NEAREST, InterpolationMode.BILINEAR)
        if interpolation not in modes:
            raise ValueError(f"interpolation must be NEAREST or BILINEAR, got {interpolation!r}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
        self.policy = policy
        self.interpolation = interpolation
        self.fill = check_fill(fill)
        self.generator = generator
        self.last_actions: Actions | None = None
        self._worker_generator: torch.Generator | None = None
        self._checked_on_device = False
        self._checked_in_worker = False

    def __getstate__(self) -> dict[str, Any]:
        # A generator as bytes: as a tensor it would travel to a spawned worker in shared memory
        # that its sender frees too early.
        state = self.__dict__.copy()
        if self.generator is not None:
            state["generator"] = self.generator.get_state().numpy().tobytes()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.generator, bytes):
            saved = torch.frombuffer(bytearray(self.generator), dtype=torch.uint8)
            self.generator = torch.Generator().set_state(saved)

    @property
    def space(self) -> SearchSpace:
        """The policy's search space."""
        return self.policy.space

    def augment(self, images: Tensor) -> tuple[Tensor, Actions]:
        """Draw for each image and apply.

        Args:
            images: (B, C, H, W) or (C, H, W), B may be 0; uint8 or floating in [0, 1].

        Returns:
            The augmented images and what was drawn; both without B if the images have none.

        Raises:
            TypeError: no tensor, or another dtype.
            ValueError: another rank or number of channels, floats outside [0, 1] or NaN. On an
                accelerator the range is checked on the first batch only, as it costs a
                synchronisation.
        """
        images = self._tensor(images)
        actions = self._sample(batch_size(images))
        self.last_actions = actions
        return self._run(images, _batched(actions)), actions

    def replay(self, images: Tensor, actions: Actions) -> Tensor:
        """Apply actions drawn before; deterministic.

        Args:
            images: as for :meth:`augment`.
            actions: as many as there are images, from the same search space.

        Raises:
            TypeError, ValueError: as :meth:`augment`, or actions that do not match.
        """
        images = self._tensor(images)
        batch = batch_size(images)
        batched = _batched(actions) if batch is None else actions
        check_actions(batched, self.space, 1 if batch is None else batch)
        return self._run(images, batched)

    def collate(self, samples: list[Any]) -> Any:
        """Collate samples (image, ...) and augment: the images, the rest, then the actions.

        For ``DataLoader(..., collate_fn=augment.collate)``: workers augment whole batches.

        Args:
            samples: tuples whose first entry is a (C, H, W) tensor.
        """
        images, *rest = default_collate(samples)
        images, actions = self.augment(images)
        return (images, *rest, actions)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Check a sample and draw for it (torchvision's hook).

        Raises:
            ValueError: no image in the sample, images of different sizes, annotations that do not
                fit their image, or what :meth:`augment` refuses.
        """
        refuse_unseen_annotations(self)
        pictures = [entry for entry in flat_inputs if not isinstance(entry, ANNOTATIONS)]
        if not pictures:
            raise ValueError("the input holds no image (PIL, tensor, tv_tensors Image or Video)")
        for picture in pictures:
            self._check(picture)
        kinds = {(batch_size(picture), tuple(tvf.get_size(picture))) for picture in pictures}
        if len(kinds) > 1:
            raise ValueError(
                "all images of a sample must have the same batch size and height and width, got "
                + ", ".join(f"batch {batch}, size {size}" for batch, size in kinds)
            )
        batch, size = kinds.pop()
        for entry in flat_inputs:
            if isinstance(entry, ANNOTATIONS):
                check_annotation(entry, size, batch)
        self.last_actions = self._sample(batch)
        return {"actions": _batched(self.last_actions), "batch": batch}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply what was drawn to one entry of a sample (torchvision's hook)."""
        actions = params["actions"]
        if isinstance(inpt, ANNOTATIONS):
            return follow(inpt, self.space, actions, batched=params["batch"] is not None)
        if isinstance(inpt, PIL.Image.Image):
            return tvf.to_pil_image(self._run(tvf.pil_to_tensor(inpt), actions), inpt.mode)
        images = inpt.as_subclass(Tensor)
        if isinstance(inpt, tv_tensors.Video):
            frames = images.shape[-4]
            actions = actions.select(torch.arange(actions.batch_size).repeat_interleave(frames))
        out = self._run(images, actions)
        return tv_tensors.wrap(out, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else out

    def extra_repr(self) -> str:
        """Search space, slots, bins and how pixels are resampled."""
        return (
            f"space={self.space.name!r}, max_ops={self.policy.max_ops}, "
            f"num_magnitude_bins={self.space.num_magnitude_bins}, "
            f"interpolation={self.interpolation.value}, fill={self.fill}"
        )

    def _tensor(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor, got {type(images).__name__}; for other samples call "
                "the transform itself"
            )
        images = images.as_subclass(Tensor)
        self._check(images)
        return images

    def _check(self, picture: Any) -> None:
        # Looking at the values of an accelerator's images waits for them: once must do.
        on_device = isinstance(picture, Tensor) and picture.device.type != "cpu"
        check_picture(picture, values=not (on_device and self._checked_on_device))
        self._checked_on_device = self._checked_on_device or on_device
        check_fill_for(self.fill, picture)

    def _sample(self, batch: int | None) -> Actions:
        if get_worker_info() is not None and not self._checked_in_worker:
            warn_if_unshared(self.policy)
            self._checked_in_worker = True
        n = 1 if batch is None else batch
        actions = self.policy.sample(n, self._generator_here())
        # What our own sampler draws is right; anything may come from a user's.
        if getattr(self.policy.sample, "__func__", None) is not Policy.sample:
            check_actions(actions, self.space, n)
        return actions.select(0) if batch is None else actions

    def _run(self, images: Tensor, actions: Actions) -> Tensor:
        """Apply batched actions to images with any number of dimensions before (C, H, W)."""
        flat = images.reshape(actions.batch_size, *images.shape[-3:])
        fill = self.fill if isinstance(self.fill, tuple) else (self.fill,)
        per_channel = fill if len(fill) > 1 else fill * flat.shape[1]
        bilinear = self.interpolation is InterpolationMode.BILINEAR
        out: Tensor = run_actions(flat, self.space, actions, per_channel, bilinear)
        return out.reshape(images.shape)

    def _generator_here(self) -> torch.Generator | None:
        """Give each DataLoader worker a stream of its own; the main process uses the generator."""
        worker = get_worker_info()
        if self.generator is None or worker is None:
            return self.generator
        if self._worker_generator is None:
            seed = (self.generator.initial_seed() ^ worker.seed) % 2**63
            self._worker_generator = torch.Generator().manual_seed(seed)
        return self._worker_generator


def _batched(actions: Actions) -> Actions:
    """Give actions of a single example a batch dimension of one."""
    if not isinstance(actions, Actions) or actions.num_ops.ndim == 1:
        return actions
    return Actions(*(field[None] for field in actions))
