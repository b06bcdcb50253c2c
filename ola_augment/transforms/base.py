"""PolicyTransform: a policy and its operations as a torchvision v2 transform."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torch.utils.data import get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from ola_augment.actions import Actions, check_actions
from ola_augment.draw import Draw
from ola_augment.files import load_policy, read_transform, save_policy
from ola_augment.kernels.pixel_format import (
    PixelFormat,
    ValueRange,
    as_grey_weights,
    as_value_range,
    pixel_format,
)
from ola_augment.logits import started_by_another, warn_if_unshared
from ola_augment.operations.apply import run_actions, run_one
from ola_augment.operations.checks import (
    as_interpolation,
    check_channels,
    check_scale,
    fill_per_channel,
    is_bilinear,
)
from ola_augment.operations.single import Step, run_on_image, steps_of
from ola_augment.policy import FixedAttributes, Policy
from ola_augment.space import SearchSpace
from ola_augment.streams import rank_here, stream_of
from ola_augment.transforms.annotations import ANNOTATIONS, check_annotation, follow
from ola_augment.transforms.collate import stack_samples, with_actions
from ola_augment.transforms.containers import refuse_unseen_annotations
from ola_augment.transforms.inputs import (
    Clips,
    Fills,
    as_fills,
    check_picture,
    fill_of,
    image_array,
    is_list_of_images,
    is_one_for_pillow,
    layout,
    plain_fill,
    restore,
    to_tensor,
)
from ola_augment.transforms.samples import (
    refuse_label_maps,
    refuse_second_picture,
    refuse_unseen_image,
)
from ola_augment.transforms.settings import from_json, to_json

if TYPE_CHECKING:
    from typing_extensions import Self


class PolicyTransform(FixedAttributes, v2.Transform):  # type: ignore[misc]
    """Draws from a policy and applies what it drew; each example of a batch gets its own.

    Called as any torchvision v2 transform: with a PIL image, a tensor (..., C, H, W), a NumPy
    image (H, W, C), tv_tensors or any nesting of these. Masks, boxes and key points follow their
    image; everything else passes through. A ``Video`` (..., T, C, H, W) gets one draw for a clip.
    The images of a list get a draw each; those of a tuple or a dictionary belong together and
    share one.

    Images are uint8, uint16 or floating in [0, 1] (or ``value_range``), of any number of channels.
    uint8 on the CPU gives Pillow's
    result; a float image k/255 gives that of the uint8 image k within the bounds in the docs. What
    resizing leaves outside of [0, 1] is accepted, and what no operation changes comes back bit for
    bit; floats that lie outside by more than 0.035 on average are another scale and are refused.

    Args:
        policy: what to draw from.
        interpolation: NEAREST (Pillow's default; NEAREST_EXACT is the same here) or BILINEAR; an
            ``InterpolationMode``, its name, or Pillow's number for it.
        fill: value outside of the image for rotate, shear and translate, in the range of the
            images (0 .. 255 for uint8, 0 .. 1 for floats); one number or one per channel, None for
            black, or a dictionary of these by type of input, ``"others"`` for the rest. Masks are
            filled with 0 unless the dictionary has an entry for ``tv_tensors.Mask``. Like
            ``interpolation`` it cannot be changed afterwards.
        generator: a CPU generator to draw with; None uses torch's global one. In a DataLoader
            worker it is replaced by one seeded with it and the worker's own seed.
        value_range: (low, high), what is black and white, such as (0, 4095) for 12 bits; None is
            0 .. 255 for uint8, 0 .. 65535 for uint16 and 0 .. 1 for floats.
        grey_weights: one weight per channel of the grey image that color and contrast blend with;
            None is Pillow's for 3 channels, otherwise the mean.

    Attributes:
        policy: the :class:`Policy`.
        rank: whose draws these are: ranks that seed alike draw differently. None is that of
            ``torch.distributed``. Where several ranks work on the same images (tensor parallel),
            set it to the same number on all of them, as ``mesh["dp"].get_local_rank()``.

    Raises:
        TypeError: ``policy`` is no :class:`Policy`, or an argument of another type.
        ValueError: a generator that is not on the CPU, an unknown interpolation, or a fill outside
            0 .. 255.

    Example:
        >>> from ola_augment import UniformPolicy
        >>> transform = PolicyTransform(UniformPolicy("rand_augment", num_ops=3))
        >>> transform(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])
    """

    _fixed = frozenset(("interpolation", "fill", "value_range", "grey_weights"))
    #: The kind of policy that :meth:`load` accepts.
    _policy_kind: ClassVar[type[Policy]] = Policy  # type: ignore[type-abstract]

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
        super().__init__()
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy, got {type(policy).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
        self.policy = policy
        self.interpolation = as_interpolation(interpolation)
        self._bilinear = is_bilinear(interpolation)
        self.value_range = as_value_range(value_range)
        self.grey_weights = as_grey_weights(grey_weights)
        self._fills = as_fills(fill, self.value_range)
        self.fill = plain_fill(fill)
        self.generator = generator
        self.rank: int | None = None
        self._started_by = 0  # the rank that started this process, where it is a worker
        self._drawn = threading.local()
        self._worker_generator: torch.Generator | None = None
        self._checked_on_device = False
        self._checked_in_worker = False

    def __getstate__(self) -> dict[str, Any]:
        # A generator as bytes: as a tensor it would travel to a spawned worker in shared memory
        # that its sender frees too early.
        state = self.__dict__.copy()
        del state["_drawn"]
        if get_spawning_popen() is not None:
            state["_started_by"] = self._rank_here()
        if self.generator is not None:
            state["generator"] = self.generator.get_state().numpy().tobytes()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drawn = threading.local()
        if isinstance(self.generator, bytes):
            saved = torch.frombuffer(bytearray(self.generator), dtype=torch.uint8)
            self.generator = torch.Generator().set_state(saved)

    @property
    def space(self) -> SearchSpace:
        """The policy's search space."""
        return self.policy.space

    @property
    def last_actions(self) -> Actions | None:
        """:class:`Actions` of the latest call in this thread, or None.

        Without a batch dimension if the images had none; in the order of the flattened batch if
        they had several, and of the list if it was one.
        """
        drawn = getattr(self._drawn, "actions", None)
        if isinstance(drawn, Draw):
            drawn = self._drawn.actions = drawn.actions()
        return drawn

    def augment(self, images: Tensor, *, clips: bool = False) -> tuple[Tensor, Actions]:
        """Draw for each image, or clip, and apply.

        Args:
            images: (B, C, H, W) or (C, H, W), B may be 0, or several dimensions; uint8 or floating
                in [0, 1]. A ``Video`` (..., T, C, H, W) is clips.
            clips: whether five and more dimensions of a plain tensor are clips (..., T, C, H, W),
                whose frames share a draw, or images.

        Returns:
            The augmented images, of the type that came, and what was drawn; both without B if the
            images have none. The actions of several batch dimensions are in the order of the
            flattened batch.

        Raises:
            TypeError: no tensor, or another dtype.
            ValueError: another rank or number of channels, floats outside [0, 1] by more than 0.035
                on average, or NaN. On an accelerator the values are checked on the first batch
                only, as it costs a synchronisation.
        """
        picture = _with_clips(images, clips)
        params = self._draw([picture])
        return self._augmented(picture, params["actions"], images), self._drawn.actions

    def replay(self, images: Tensor, actions: Actions, *, clips: bool = False) -> Tensor:
        """Apply actions drawn before; deterministic.

        Args:
            images: (B, C, H, W) or (C, H, W), or several dimensions; uint8 or floating in [0, 1].
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *inputs: Any) -> Any:
        """Augment a sample; ``torch.compile`` leaves the call as it is.

        Args:
            inputs: an image, or a sample that holds one, as one argument or several.

        Returns:
            The sample with its images augmented, its annotations moved with them, and the rest as
            it was; of the same structure, types, shapes and dtypes.

        Raises:
            TypeError, ValueError: what :meth:`make_params` refuses.
        """
        sample = inputs if len(inputs) > 1 else inputs[0]
        alone = isinstance(sample, (PIL.Image.Image, Tensor, np.ndarray))
        if alone and not isinstance(sample, ANNOTATIONS):
            if self._hooks_are_ours and self._is_for_pillow(sample):
                return self._augment_one(sample)
            return self.transform(sample, self.make_params([sample]))
        if not is_list_of_images(sample):
            return super().forward(*inputs)
        for picture in sample:
            self._check(picture)
        refuse_label_maps(sample)
        self._check_scale(sample)
        self._drawn.scale_is_checked = True
        try:
            params = [self.make_params([picture]) for picture in sample]
        finally:
            self._drawn.scale_is_checked = False
        self._drawn.actions = Actions.cat([drawn["actions"] for drawn in params])
        return [self.transform(*pair) for pair in zip(sample, params, strict=True)]

    @property
    def _hooks_are_ours(self) -> bool:
        """Whether :meth:`_augment_one` does what it does here, not replaced by a subclass."""
        kind = type(self)
        return (
            kind.make_params is PolicyTransform.make_params
            and kind.transform is PolicyTransform.transform
            and getattr(self.policy.sample, "__func__", None) is Policy.sample
        )

    def _is_for_pillow(self, sample: Any) -> bool:
        of_bytes = self.value_range in (None, (0, 255)) and self.grey_weights is None
        return of_bytes and is_one_for_pillow(sample)

    def _augment_one(self, picture: Any) -> Any:
        """Draw for and augment one uint8 image, without making a tensor of what was drawn."""
        refuse_unseen_annotations(self)
        self._check(picture)
        self._look_around_in_worker()
        self._drawn.actions = drawn = self.policy.sample_one(self._generator_here())
        steps = [(op, k, sign, at) for op, kept, k, sign, at in drawn.slots if kept]
        return self._run_steps(picture, steps)

    def _run_steps(self, picture: Any, steps: list[Step]) -> Any:
        fill = fill_per_channel(fill_of(self._fills, picture), self._pixels(picture))
        if isinstance(picture, PIL.Image.Image):
            return run_on_image(picture, self.space, steps, fill, self._bilinear)
        return restore(
            run_one(to_tensor(picture), self.space, steps, fill, self._bilinear), picture
        )

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
        refuse_unseen_annotations(self)
        return self._draw(flat_inputs)

    def _draw(self, flat_inputs: list[Any]) -> dict[str, Any]:
        pictures = [entry for entry in flat_inputs if not isinstance(entry, ANNOTATIONS)]
        if not pictures:
            raise TypeError(
                "the input holds no image (PIL, tensor, uint8 array (H, W, C), tv_tensors Image or "
                "Video)"
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

    def freeze(self) -> Self:
        """Stop learning: the policy stays as it is, and goes on augmenting.

        An :class:`OLALearner` then costs nothing; ``augment.policy.requires_grad_()`` lets the
        policy learn again.

        Returns:
            The transform itself.
        """
        self.policy.requires_grad_(False)
        return self

    def save(self, path: str | Path) -> None:
        """Write policy, interpolation and fill as JSON, atomically; the generator is not written.

        Args:
            path: of the file, replaced if it is there. :func:`load_policy` reads it as well.

        Raises:
            TypeError: a policy of a kind that cannot be saved, or a fill for a type of your own.
            OSError: the file cannot be written; an old one is untouched.
        """
        settings = to_json(self.interpolation, self.fill, self.value_range, self.grey_weights)
        save_policy(self.policy, path, transform=settings)

    @classmethod
    def load(
        cls,
        path: str | Path,
        space: SearchSpace | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Read what :meth:`save` wrote, or a file of :func:`save_policy`.

        Args:
            path: of the JSON file.
            space: with the operations of the file, for spaces with a user's own kernels.
            generator: a CPU generator to draw with; None uses torch's global one.

        Returns:
            A transform of this class.

        Raises:
            ValueError: not such a file, or one with a policy of another kind than this class's.
        """
        policy, settings = load_policy(path, space), read_transform(path)
        if not isinstance(policy, cls._policy_kind):
            raise ValueError(
                f"{path} holds a {type(policy).__name__}, {cls.__name__} needs a "
                f"{cls._policy_kind.__name__}; PolicyTransform.load reads every kind"
            )
        transform = cls.__new__(cls)
        try:
            PolicyTransform.__init__(transform, policy, generator=generator, **from_json(settings))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a complete policy file: {error}") from error
        return transform

    def extra_repr(self) -> str:
        """Search space, slots, bins and how pixels are resampled.

        Returns:
            The text between the parentheses of ``repr(transform)``.
        """
        more = "".join(
            f", {name}={getattr(self, name)}"
            for name in ("value_range", "grey_weights")
            if getattr(self, name) is not None
        )
        return (
            f"space={self.space.name!r}, max_ops={self.policy.max_ops}, "
            f"num_magnitude_bins={self.space.num_magnitude_bins}, "
            f"interpolation={self.interpolation.value}, fill={self.fill}{more}"
        )

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

    def _check_scale(self, pictures: Sequence[Any]) -> None:
        """Look at the values of the pictures of one batch, unless no operation is ever applied."""
        tensors = [to_tensor(picture) for picture in pictures if not layout(picture).whole]
        # Looking at the values of an accelerator's images waits for them: once must do.
        on_device = any(tensor.device.type != "cpu" for tensor in tensors)
        if on_device and self._checked_on_device:
            return
        try:
            check_scale(tensors, self._pixels(pictures[0]))
        except ValueError:
            with torch.no_grad():
                if float(self.policy.applied_ops()) > 0:
                    raise
        self._checked_on_device = self._checked_on_device or on_device

    def _needs_transform_list(self, flat_inputs: list[Any]) -> list[bool]:
        """Which entries are images and annotations (torchvision's hook): arrays can be, too."""
        refuse_second_picture(flat_inputs)
        array = image_array(flat_inputs)
        if array is None:
            needed: list[bool] = super()._needs_transform_list(flat_inputs)
            refuse_unseen_image(flat_inputs, needed)
            return needed
        return [i == array or isinstance(x, ANNOTATIONS) for i, x in enumerate(flat_inputs)]

    def _look_around_in_worker(self) -> None:
        if not self._checked_in_worker and (get_worker_info() or started_by_another()):
            warn_if_unshared(self.policy)
            self._checked_in_worker = True

    def _sample(self, n: int) -> Actions:
        self._look_around_in_worker()
        actions = self.policy.sample(n, self._generator_here())
        # What our own sampler draws is right; anything may come from a user's.
        if getattr(self.policy.sample, "__func__", None) is not Policy.sample:
            check_actions(actions, self.space, n)
        return actions

    def _apply_actions(self, picture: Any, actions: Actions) -> Any:
        """Apply as many actions to a picture as it has images, or clips."""
        pixels = self._pixels(picture)
        if isinstance(picture, PIL.Image.Image) and pixels.of_pillow:
            return self._run_steps(picture, steps_of(actions)[0])
        images = to_tensor(picture)
        count, draws = math.prod(images.shape[:-3]), actions.batch_size
        if count != draws:
            frames = torch.arange(draws, device="cpu").repeat_interleave(count // draws)
            actions = actions.select(frames)
        flat = images.reshape(count, *images.shape[-3:])
        fill = fill_per_channel(fill_of(self._fills, picture), pixels)
        out = run_actions(flat, self.space, actions, fill, self._bilinear, pixels)
        return restore(out.reshape(images.shape), picture)

    def _generator_here(self) -> torch.Generator | None:
        """Give each DataLoader worker and each rank a stream of its own."""
        return stream_of(self._seeded_here(), self._rank_here())

    def _seeded_here(self) -> torch.Generator | None:
        worker = get_worker_info()
        if self.generator is None or worker is None:
            return self.generator
        if self._worker_generator is None:
            seed = (self.generator.initial_seed() ^ worker.seed) % 2**63
            self._worker_generator = torch.Generator().manual_seed(seed)
        return self._worker_generator

    def _rank_here(self) -> int:
        return self.rank if self.rank is not None else rank_here() or self._started_by


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
