"""PolicyTransform: a policy and its operations as a torchvision v2 transform."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.files import load_policy, read_transform, save_policy
from ola_augment.policy import Policy
from ola_augment.space import SearchSpace
from ola_augment.transforms.annotations import ANNOTATIONS
from ola_augment.transforms.applying import Applying
from ola_augment.transforms.batches import Batches
from ola_augment.transforms.containers import refuse_deaf_containers
from ola_augment.transforms.inputs import is_list_of_images
from ola_augment.transforms.samples import refuse_label_maps, refuse_unwrapped_annotations
from ola_augment.transforms.settings import from_json, to_json

if TYPE_CHECKING:
    from typing_extensions import Self


class PolicyTransform(Batches):
    """Draws from a policy and applies what it drew; each example of a batch gets its own.

    Called as any torchvision v2 transform: with a PIL image, a tensor (..., C, H, W), a NumPy
    image (H, W, C), tv_tensors or any nesting of these. Masks, boxes and key points follow their
    image; everything else passes through. A ``Video`` (..., T, C, H, W) gets one draw for a clip.
    The images of a list get a draw each; those of a tuple or a dictionary belong together and
    share one.

    Images are uint8, uint16, int16 with a ``value_range``, or floating in [0, 1] (or
    ``value_range``), of any number of channels.
    uint8 on the CPU gives Pillow's result; a float image k/255 gives that of the uint8 image k
    within the bounds in the docs. What resizing leaves outside of the range is accepted, and what
    no operation changes comes back bit for bit; floats that lie outside by more than 0.035 of it on
    average are another scale and are refused.

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
            worker it is replaced by one seeded with it and the worker's own seed; transforms that
            were given one generator share it there, too.
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
            of the range (without ``value_range`` of 0 .. 65535).

    Example:
        >>> from ola_augment import UniformPolicy
        >>> transform = PolicyTransform(UniformPolicy("rand_augment", num_ops=3))
        >>> transform(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])
    """

    #: The kind of policy that :meth:`load` accepts.
    _policy_kind: ClassVar[type[Policy]] = Policy  # type: ignore[type-abstract]

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
            RuntimeError: while it is exported or traced.
        """
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if tracing or torch.compiler.is_exporting():
            raise RuntimeError(
                f"{type(self).__name__} cannot be exported or traced, as each call draws anew; do "
                "so with the model alone, without its augmentation"
            )
        sample = inputs if len(inputs) > 1 else inputs[0]
        alone = isinstance(sample, (PIL.Image.Image, Tensor, np.ndarray))
        if alone and not isinstance(sample, ANNOTATIONS):
            if self._hooks_are_ours and self._is_for_pillow(sample):
                refuse_deaf_containers(self)
                seen = self._look_at(sample)
                return self._run_one(sample, self._sample_one().slots, seen)
            return self.transform(sample, self.make_params([sample]))
        if not is_list_of_images(sample):
            refuse_unwrapped_annotations(sample)
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
        """Whether drawing for one image does what it does here, not replaced by a subclass."""
        kind = type(self)
        return (
            kind.make_params is PolicyTransform.make_params
            and kind.transform is PolicyTransform.transform
            and getattr(self.policy.sample, "__func__", None) is Policy.sample
        )

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
            Applying.__init__(transform, policy, generator=generator, **from_json(settings))
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
