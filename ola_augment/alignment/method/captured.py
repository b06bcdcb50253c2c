"""The value that a capture hands out, and that aligns its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ola_augment.alignment._fsdp import Along
from ola_augment.alignment.calls.expressions import Tangents
from ola_augment.alignment.method.freshness import Freshness
from ola_augment.alignment.method.storage import in_full_precision
from ola_augment.alignment.method.tape import Tape
from ola_augment.alignment.proof import SumCheck


class NotFinite(RuntimeError):
    """An alignment or norm is NaN or Inf: a bad batch, which a loop may skip.

    Example:
        >>> issubclass(NotFinite, RuntimeError)
        True
    """


class Captured:
    """The examples of one capture, ready to be aligned with a reference gradient.

    `GradientAlignment.capture` hands it out; it is complete when the ``with`` block ends. Several
    may wait at once. It holds what the alignments need for as long as it lives.

    Example:
        >>> from ola_augment import GradientAlignment
        >>> model = nn.Linear(3, 2)
        >>> with GradientAlignment(model).capture(norms=True) as captured:
        ...     model(torch.ones(4, 3)).square().sum().backward()
        >>> captured.norms().shape
        torch.Size([4])
    """

    def __init__(self, current: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        self._current = current
        self._content: Content | None = None

    def complete(self, content: Content) -> None:
        """Called at the end of the capture."""
        self._content = content

    @property
    def passes(self) -> tuple[int, ...]:
        """Numbers of examples of the forward passes, in their order.

        Raises:
            RuntimeError: the capture is not complete.
        """
        return tuple(tape.batch for tape in self._complete().tapes)

    @torch.no_grad()
    def align(self, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        """Align the captured examples with a reference gradient.

        Args:
            gradients: parameter name -> tensor of its shape, g; parameters that are not named count
                as zero. By default the parameters' ``.grad``: read them before gradient clipping.
                None for a capture that was given its reference gradient. Several references at
                once: parameter name -> ``(R, *shape)`` for all that are named.

        Returns:
            (B,) alignments, float32 (float64 for double precision models), in the order of the
            examples; zero for examples that no backward reached. (R, B) for R references.

        Raises:
            RuntimeError: the capture is not complete, no backward since the capture or one on top
                of its own gradient, the model's parameters are not those of the capture, the
                alignments do not sum to the gradient that was received, or the result is not
                finite.
            TypeError: ``gradients`` is not a mapping of tensors.
            ValueError: a name, shape or device in ``gradients`` does not fit, or the capture has
                its reference gradient already.
        """
        content = self._complete()
        parameters = self._current()
        content.freshness.check_unchanged(parameters)
        if content.direction is not None:
            if gradients is not None:
                raise ValueError(
                    "gradients was given to capture() already: align() takes none after it"
                )
            direction: Mapping[str, Tensor] = content.direction
        elif gradients is None:
            direction = content.freshness.gradient()
        else:
            direction = checked_gradients(gradients, parameters, stacked=True)
            name, first = next(iter(direction.items()))
            if first.shape != parameters[name].shape:
                return content.align_all(direction, len(first))
        return content.align(direction)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Norms of the examples' gradients over all trainable parameters, for cosine rewards.

        Returns:
            (B,) ``|grad l_i|``, in the order, the precision and with the factor of the alignments:
            ``align() / norms()`` is ``|g|`` times the cosine.

        Raises:
            RuntimeError: the capture is not complete, was not asked for norms, or one is not
                finite.
        """
        norms = self._complete().norms
        if norms is None:
            raise RuntimeError("norms() needs a capture that was asked for them: norms=True")
        return checked_result(norms, {}).clone()

    def _complete(self) -> Content:
        if self._content is None:
            raise RuntimeError("nothing to align: run a forward and backward inside capture()")
        return self._content


@dataclass
class Content:
    """See `Captured`.

    Attributes:
        tapes: forward passes in the order of the calls.
        factors: what the alignments of each are multiplied by: (batch,), or one for all.
        freshness: of the parameters' gradients.
        check: of sums, with what each parameter received; None where it is done.
        direction: the reference gradient, if the capture was given one.
        like: an empty tensor in the alignments' precision and place.
        norms: (sum of batches,) of the examples' gradients, if they were asked for.
    """

    tapes: list[Tape]
    factors: list[Tensor | float]
    freshness: Freshness
    check: SumCheck | None
    direction: Mapping[str, Tensor] | None
    like: Tensor
    norms: Tensor | None = None

    def align(self, direction: Mapping[str, Tensor]) -> Tensor:
        """(sum of batches,), after the check of sums; raises `NotFinite`."""
        parts = []
        found: list[tuple[frozenset[str], Tensor]] = []
        with in_full_precision(self.like.device.type):
            for tape, factor in zip(self.tapes, self.factors, strict=True):
                own = tape.contract(Tangents(direction, tape.values))
                total = (
                    torch.stack([values.to(self.like) for _, values in own]).sum(0)
                    if own
                    else self.like.new_zeros(tape.batch)
                )
                parts.append((total * factor).to(self.like))
                found += own
        alignments = checked_result(torch.cat(parts) if len(parts) > 1 else parts[0], direction)
        if self.check is not None:
            self.check.compare(found, direction)
        return alignments

    def align_all(self, stack: Mapping[str, Tensor], references: int) -> Tensor:
        """(R, sum of batches), for name -> (R, *shape); the sums are checked along a mixture."""
        directions = [{name: one[r] for name, one in stack.items()} for r in range(references)]
        signs = self.like.new_tensor([1.0, -1.0]).repeat(references)[:references]
        parts = []
        found: list[tuple[frozenset[str], Tensor]] = []
        with in_full_precision(self.like.device.type):
            for tape, factor in zip(self.tapes, self.factors, strict=True):
                own = tape.contract_all(stack, [Tangents(one, tape.values) for one in directions])
                total = self.like.new_zeros(references, tape.batch)
                for _, values in own:
                    total += values.to(self.like)
                parts.append((total * factor).to(self.like))
                found += [(names, signs @ values.to(self.like)) for names, values in own]
        mixture = {n: torch.tensordot(signs.to(one.dtype), one, 1) for n, one in stack.items()}
        alignments = checked_result(torch.cat(parts, 1), stack)
        if self.check is not None:
            self.check.compare(found, mixture)
        return alignments


def checked_gradients(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor], stacked: bool = False
) -> dict[str, Tensor]:
    """A reference gradient given by name, checked against the parameters; perhaps several."""
    if not isinstance(gradients, Mapping):
        raise TypeError(
            f"gradients must be a mapping from parameter name to tensor, got "
            f"{type(gradients).__name__}"
        )
    stacks: set[int | None] = set()
    for name, gradient in gradients.items():
        if name not in parameters:
            raise ValueError(f"gradients names {name!r}, which is no trainable parameter")
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradients[{name!r}] must be a tensor, got {type(gradient).__name__}")
        parameter = parameters[name]
        several = stacked and gradient.dim() == parameter.dim() + 1
        stacks.add(len(gradient) if several else None)
        shape = gradient.shape[1:] if several else gradient.shape
        if shape != parameter.shape or gradient.device != parameter.device:
            raise ValueError(
                f"gradients[{name!r}] must have shape {tuple(parameter.shape)} on "
                f"{parameter.device}, got {tuple(gradient.shape)} on {gradient.device}"
            )
    if len(stacks) > 1 or stacks == {0}:
        raise ValueError(
            "gradients must hold one reference for every parameter that it names, or the same "
            f"number R > 0 of them, (R, *shape); got {sorted(map(str, stacks))}"
        )
    if not gradients:
        raise ValueError("gradients is empty: name at least one parameter")
    return {name: gradient.detach() for name, gradient in gradients.items()}


def checked_result(alignments: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    """The alignments, unless one is no number.

    Raises:
        NotFinite: an alignment is inf or NaN, with where it comes from.
    """
    finite = torch.isfinite(alignments)
    if bool(finite.all()):
        return alignments
    bad = (
        direction.not_finite()
        if isinstance(direction, Along)
        else [name for name, g in direction.items() if not bool(torch.isfinite(g).all())]
    )
    source = (
        f"the reference gradient of {bad[0]!r} is not finite"
        if bad
        else "the captured activations or their gradients are not finite (a diverged loss, or an "
        "overflow under autocast)"
    )
    raise NotFinite(
        f"{int((~finite).sum())} of {finite.numel()} alignments are inf or NaN: {source}; skip "
        "this update"
    )
