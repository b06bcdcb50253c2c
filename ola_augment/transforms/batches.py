"""Batches of a transform: what is returned has the actions beside it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torchvision import tv_tensors

from ola_augment.actions import Actions, check_actions, unwrapped_actions
from ola_augment.transforms.collate import stack_samples, with_actions
from ola_augment.transforms.hooks import Hooks
from ola_augment.transforms.inputs import Clips, layout, restore


class Batches(Hooks):
    """A transform of batches: :meth:`augment`, :meth:`replay` and :meth:`collate`."""

    def augment(self, images: Tensor, *, clips: bool = False) -> tuple[Tensor, Actions]:
        """Draw for each image, or clip, and apply.

        Args:
            images: (B, C, H, W) or (C, H, W), B may be 0, or several dimensions. A ``Video``
                (..., T, C, H, W) is clips.
            clips: whether five and more dimensions of a plain tensor are clips (..., T, C, H, W),
                whose frames share a draw, or images.

        Returns:
            The augmented images, of the type that came, and what was drawn; both without B if the
            images have none. The actions of several batch dimensions are in the order of the
            flattened batch.

        Raises:
            TypeError: no tensor, or another dtype.
            ValueError: another rank, clips whose channels seem to come first, floats outside of
                their range by more than 0.035 of it on average, or NaN. On an accelerator the
                values are checked on the first batch only, as it costs a synchronisation.
        """
        picture = _with_clips(images, clips)
        params = self._draw([picture])
        return self._augmented(picture, params["actions"], images), self._drawn.actions

    def replay(self, images: Tensor, actions: Actions, *, clips: bool = False) -> Tensor:
        """Apply actions drawn before; deterministic.

        Args:
            images: (B, C, H, W) or (C, H, W), or several dimensions, as :meth:`augment`.
            actions: as many as there are images, or clips, from the same search space.
            clips: whether five and more dimensions of a plain tensor are clips (..., T, C, H, W),
                whose frames share a draw, or images.

        Returns:
            A new tensor of the type, shape and dtype of ``images``.

        Raises:
            TypeError, ValueError: what :meth:`augment` refuses, or actions that do not match.
        """
        picture = _with_clips(images, clips)
        self._check(picture)
        actions = unwrapped_actions(actions)
        batch = layout(picture).batch
        batched = actions if batch else _batched(actions)
        check_actions(batched, self.space, math.prod(batch))
        if bool(batched.keep.any()):
            self._check_scale([picture])
        return self._augmented(picture, batched, images)

    def _augmented(self, picture: Tensor, actions: Actions, like: Tensor) -> Tensor:
        out: Tensor = self._apply_actions(picture, actions)
        return out if picture is like else restore(out.as_subclass(Tensor), like)

    def collate(self, samples: list[Any]) -> Any:
        """Collate samples and augment: a batch like a sample, and the actions beside it.

        For ``DataLoader(..., collate_fn=augment.collate)``: workers augment whole batches. The
        image of a sample is found as in a call, so that masks follow; PIL images and arrays become
        tensors (C, H, W).

        Args:
            samples: an image each, or a tuple, list, named tuple or dictionary with one or more. A
                clip, a ``Video`` or plain (T, C, H, W), gets one draw, as an image does.

        Returns:
            ``(images, actions)``, ``(*sample, actions)``, or the dictionary with an entry
            ``"actions"``.

        Raises:
            TypeError, ValueError: samples that differ in structure or in the size of their images,
                that have boxes or key points (which belong to one image), or what a call refuses.
        """
        batches, chosen, spec = stack_samples(samples, self._needs_transform_list)
        picked = list(zip(batches, chosen, strict=True))
        params = self.make_params([entry for entry, picture in picked if picture])
        done = [
            self.transform(entry, params).as_subclass(Tensor) if picture else entry
            for entry, picture in picked
        ]
        return with_actions(tree_unflatten(done, spec), params["actions"])

    def collate_plain(self, samples: list[Any]) -> Any:
        """Collate samples as :meth:`collate` does, and augment nothing: for evaluation.

        Args:
            samples: an image each, or a tuple, list, named tuple or dictionary with one or more.

        Returns:
            A batch like a sample.

        Raises:
            TypeError, ValueError: what :meth:`collate` refuses of samples.
        """
        batches, chosen, spec = stack_samples(samples, self._needs_transform_list)
        done = [
            entry.as_subclass(Tensor) if picture else entry
            for entry, picture in zip(batches, chosen, strict=True)
        ]
        return tree_unflatten(done, spec)


def _with_clips(images: Any, clips: bool) -> Tensor:
    """The images, plain clips as :class:`Clips`."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor, got {type(images).__name__}; for other samples call the "
            "transform itself"
        )
    plain = not isinstance(images, tv_tensors.TVTensor) and images.ndim > 4
    return images.as_subclass(Clips) if clips and plain else images


def _batched(actions: Actions) -> Actions:
    """Give actions of a single example a batch dimension of one."""
    if not isinstance(actions, Actions) or actions.num_ops.ndim == 1:
        return actions
    return Actions(*(field[None] for field in actions))
