"""What a capture leaves behind: tapes of forward passes, and the value that aligns them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ola_augment.alignment.expressions import Node, Tangents
from ola_augment.alignment.norms import ExampleNorms
from ola_augment.alignment.storage import in_full_precision
from ola_augment.alignment.sums import SumCheck
from ola_augment.alignment.terms import PackedTerm


@dataclass(eq=False)
class Tape:
    """One forward pass: its batch and, after backward, its terms.

    Attributes:
        batch: number of examples.
        terms: with the node whose tangent each meets, while the reference gradient is not known.
        contracted: (batch,) each with the parameters it belongs to, when it is.
        norms: of the examples' gradients, if they are asked for.
    """

    batch: int
    terms: list[tuple[Node, PackedTerm]] = field(default_factory=list)
    contracted: list[tuple[frozenset[str], Tensor]] = field(default_factory=list)
    norms: ExampleNorms | None = None

    def explained(self) -> Iterable[str]:
        """Names of the parameters that have a term."""
        if self.norms is not None:
            yield from self.norms.names()
        for node, _ in self.terms:
            yield from node.names
        for names, _ in self.contracted:
            yield from names

    def contract(self, tangents: Tangents) -> list[tuple[frozenset[str], Tensor]]:
        """<d l_i / d node, tangent> for each term, (batch,)."""
        found = list(self.contracted)
        for node, term in self.terms:
            tangent = tangents(node)
            if tangent is not None:
                found.append((node.names, term.contract(tangent)))
        return found


class Freshness:
    """Tells whether the parameters' ``.grad`` are those of a batch after the capture, alone.

    Watches one parameter: the first backward that finds its ``.grad`` empty, or zero, starts anew.

    Args:
        parameters: those of the capture, by name.
        received: names of those that received a gradient in it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], received: Iterable[str]) -> None:
        self._parameters = parameters
        named = [name for name in received if parameters[name].grad is not None]
        # The smallest stands for all; where its gradient is zero nothing can be seen in it.
        named.sort(key=lambda name: parameters[name].numel())
        self._sentinel = next(
            (parameters[name] for name in named if holds_gradient(parameters[name])), None
        )
        self._old = None if self._sentinel is None else self._sentinel.grad
        self._seen = self._clean = self._sentinel is None
        if self._sentinel is not None:
            watcher = weakref.ref(self)  # the hook must not keep what it serves alive

            def backward(gradient: Tensor) -> None:
                if (fresh := watcher()) is not None:
                    fresh._backward()

            handle = self._sentinel.register_hook(backward)  # type: ignore[no-untyped-call]
            self._forget = weakref.finalize(self, handle.remove)

    def _backward(self) -> None:
        assert self._sentinel is not None
        self._seen = True
        if not holds_gradient(self._sentinel):
            self._clean = True
            self._forget()

    def check_unchanged(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Refuse a model whose parameters are not those of the capture.

        Raises:
            RuntimeError: naming a parameter that was added, removed or replaced.
        """
        for name in (*self._parameters, *parameters):
            if parameters.get(name) is not self._parameters.get(name):
                raise RuntimeError(
                    f"the model changed between capture and align: parameter {name!r} was added, "
                    "removed, frozen or replaced"
                )

    def gradient(self) -> dict[str, Tensor]:
        """The parameters' ``.grad``, by name.

        Raises:
            RuntimeError: there is none, no backward wrote one since the capture, or the captured
                batch's own gradient is still part of it.
        """
        direction = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        if not direction:
            raise RuntimeError(
                "no reference gradient: all parameters' .grad are None; run the next batch's "
                "backward before align(), or pass gradients"
            )
        if self._clean or self._sentinel is None or not holds_gradient(self._sentinel):
            return direction
        if self._seen:
            raise RuntimeError(NOT_ZEROED)
        if self._sentinel.grad is self._old:
            raise RuntimeError(
                "no reference gradient since the capture: the parameters' .grad are those of the "
                "captured backward; run the next batch's backward before align()"
            )
        return direction


def holds_gradient(parameter: nn.Parameter) -> bool:
    """Whether a parameter's ``.grad`` has a value other than zero."""
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


NOT_ZEROED = (
    "the parameters' .grad still hold the captured batch's own gradient: they were not zeroed "
    "before the next backward. Call optimizer.zero_grad() between the captured step and the next "
    "batch's, or pass gradients"
)


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

    @torch.no_grad()
    def align(self, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        """Align the captured examples with a reference gradient.

        Args:
            gradients: parameter name -> tensor of its shape, g; parameters that are not named count
                as zero. By default the parameters' ``.grad``: read them before gradient clipping.
                None for a capture that was given its reference gradient.

        Returns:
            (B,) alignments, float32 (float64 for double precision models), in the order of the
            examples; zero for examples that no backward reached.

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
            direction = checked_gradients(gradients, parameters)
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
        factors: what the alignments of each are multiplied by.
        values: parameters at the capture, for expressions.
        freshness: of the parameters' gradients.
        check: of sums, with what each parameter received.
        direction: the reference gradient, if the capture was given one.
        like: an empty tensor in the alignments' precision and place.
        norms: (sum of batches,) of the examples' gradients, if they were asked for.
    """

    tapes: list[Tape]
    factors: list[float]
    values: dict[str, Tensor]
    freshness: Freshness
    check: SumCheck
    direction: Mapping[str, Tensor] | None
    like: Tensor
    norms: Tensor | None = None

    def align(self, direction: Mapping[str, Tensor]) -> Tensor:
        """(sum of batches,), after the check of sums; raises `NotFinite`."""
        tangents = Tangents(direction, self.values)
        parts = []
        found: list[tuple[frozenset[str], Tensor]] = []
        with in_full_precision(self.like.device.type):
            for tape, factor in zip(self.tapes, self.factors, strict=True):
                own = tape.contract(tangents)
                total = (
                    torch.stack([values.to(self.like) for _, values in own]).sum(0)
                    if own
                    else self.like.new_zeros(tape.batch)
                )
                parts.append(total * factor if factor != 1 else total)
                found += own
        alignments = checked_result(torch.cat(parts) if len(parts) > 1 else parts[0], direction)
        self.check.compare(found, direction)
        return alignments


def checked_gradients(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A reference gradient given by name, checked against the parameters."""
    if not isinstance(gradients, Mapping):
        raise TypeError(
            f"gradients must be a mapping from parameter name to tensor, got "
            f"{type(gradients).__name__}"
        )
    for name, gradient in gradients.items():
        if name not in parameters:
            raise ValueError(f"gradients names {name!r}, which is no trainable parameter")
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradients[{name!r}] must be a tensor, got {type(gradient).__name__}")
        parameter = parameters[name]
        if gradient.shape != parameter.shape or gradient.device != parameter.device:
            raise ValueError(
                f"gradients[{name!r}] must have shape {tuple(parameter.shape)} on "
                f"{parameter.device}, got {tuple(gradient.shape)} on {gradient.device}"
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
    bad = [name for name, g in direction.items() if not bool(torch.isfinite(g).all())]
    source = (
        f"the reference gradient of {bad[0]!r} is not finite"
        if bad
        else "the captured activations or their gradients are not finite (a diverged loss, or an "
        "overflow under autocast)"
    )
    raise NotFinite(
        f"{int((~finite).sum())} of {len(finite)} alignments are inf or NaN: {source}; skip this "
        "update"
    )
