"""The door of the room: what a capture asks while it records.

`Proof` belongs to an engine and remembers what was verified; `Examination` accompanies one capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.alignment._fsdp import Sharded
from ola_augment.alignment._torch import saved_apart, unwatched, without
from ola_augment.alignment.calls.arguments import Function
from ola_augment.alignment.calls.watch import Step, Watch
from ola_augment.alignment.proof.changes import weights_of
from ola_augment.alignment.proof.decisions import Decision
from ola_augment.alignment.proof.inputs import check_inputs, refuse_other_batch, tensors_with_rows
from ola_augment.alignment.proof.known import Proof, Verified
from ola_augment.alignment.proof.probe import repeat, verify
from ola_augment.alignment.proof.separation import GraphNode, Hooks, Located, Separation
from ola_augment.alignment.proof.snapshot import Counters, Restore, random_states
from ola_augment.alignment.proof.sums import RandomDirection, SumCheck, unexplained


class Examination:
    """Of one capture.

    Args:
        proof: what earlier captures verified; added to.
        model: the module whose calls are forward passes.
        parameters: those of its parameters that are trained, by name.
        rounding: relative error that the storage of the terms may add to sums of them.
        direction: the reference gradient, if it is known.
        sharded: of a model whose parameters processes share: they do everything in step.
    """

    def __init__(
        self,
        proof: Proof,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        rounding: float,
        direction: Mapping[str, Tensor] | None,
        sharded: Sharded | None,
    ) -> None:
        self._proof = proof
        self._sharded = sharded
        self._model = model
        self._parameters = parameters
        #: Of the alignments' sums, along the reference gradient.
        passing = sharded is not None
        self.sums = SumCheck(rounding if direction is None else 0.0, direction, passing)
        #: Whether the capture is one that is verified.
        self.verifying = False
        #: What terms are contracted with in it, before any rounding.
        self.random = RandomDirection(parameters)
        self._exact = SumCheck(0.0, self.random)
        self._along_random: list[tuple[frozenset[str], Tensor]] = []
        self._received: set[str] = set()
        self._signatures: list[object] = []
        self._known = Verified()
        self._signature: object = None
        self._restore_random: Restore | None = None
        self._batches: set[int] = set()
        self._ranks = proof.ranks
        self._ranks.together = self._ranks.together or passing
        self._calls = 0
        self._hooks = Hooks()
        self._retaining: list[Tensor] = []

    def begin(self, watch: Watch[Any], args: Any, kwargs: Any) -> tuple[int, list[Tensor]]:
        """A forward pass begins: its batch and its tensors; verified before it where that is due.

        Raises:
            ValueError: there is no batch among the tensors of the call, or an empty one.
            RuntimeError: examples are mixed.
        """
        with unwatched():
            tensors = tensors_with_rows(args, kwargs)
            with self._ranks.told():
                self._signature = self._signed(tensors)
            batch, device = tensors[0].shape[0], tensors[0].device
        self._known = self._proof.of(self._signature)
        due = self._proof.due(self._known)
        self._verify(watch, args, kwargs, batch, due)
        self._calls = self._ranks.calls()
        self._restore_random = random_states(device) if batch > 1 else None
        with unwatched():
            self._counters = Counters(self._model)
        self._batches.add(batch)
        return batch, tensors

    def where(self, step: Step) -> Decision | None:
        """Where the examples lie in an output of the pass; None: not known before its end."""
        return self._known.decisions.get(step)

    def end(self, watch: Watch[Any], args: Any, kwargs: Any, output: Any) -> bool:
        """The pass ends: verify its path if it is a new one, and say whether it was.

        Raises:
            ValueError: what came out is not of the batch that went in.
            RuntimeError: examples are mixed, or the pass cannot be repeated.
        """
        watch.end_path()
        with unwatched():
            batch = tensors_with_rows(args, kwargs)[0].shape[0]
            with self._ranks.told():
                if batch == 1:
                    refuse_other_batch(args, kwargs, output)
        path = watch.walked(self._known.decisions)
        self._ranks.together = self._ranks.together or self._ranks.calls() > self._calls
        new = self._restore_random is not None and path not in self._known.paths
        if not new:
            self._verify(watch, args, kwargs, batch, due=False)
            return False
        assert self._restore_random is not None
        after = random_states(next(iter(self._parameters.values())).device)
        self._restore_random()
        try:
            with self._counters.put_back():
                found = self._verify(watch, args, kwargs, batch, due=True)
        finally:
            after()
        if found != watch.walked(self._known.decisions):
            raise RuntimeError(
                "the model's forward pass took another path when it was repeated on the same "
                "batch from the same state (a counter or random state outside of the model?): it "
                "cannot be verified"
            )
        return True

    def asked(self, function: Function, args: Any) -> Any:
        """A call that reads no parameter, but may ask for gradients: its arguments from now on."""
        if function is Tensor.retain_grad:
            self._retaining.append(args[0])
        elif function in (Tensor.register_hook, torch.autograd.graph.register_multi_grad_hook):
            self._hooks.any = True
        if function is Tensor.register_hook and len(args) == 2:
            return (args[0], self._hooks.resting_at_times(args[1]))
        return args

    def loss(
        self,
        loss: Tensor,
        gradient: Tensor | None,
        located: Mapping[GraphNode, Located],
        once: bool,
    ) -> None:
        """A loss is about to be differentiated: refuse one that mixes examples.

        Looked at where it ends in a way that was not met before.

        Args:
            loss: of any shape.
            gradient: of the loss, None for a scalar.
            located: outputs of calls that read parameters.
            once: a part of the graph permits a single backward.

        Raises:
            RuntimeError: a loss, a head outside of forward, or a hook mixes them.
        """
        separation = Separation(loss, gradient, located)
        if separation.ending in self._known.endings and not self.verifying:
            return
        sizes = [size for size in self._batches if size > 1]
        weights = {size: weights_of(size, self._known.passes) for size in sizes}
        retained = [(tensor, tensor.grad) for tensor in self._retaining]
        try:
            separation.check(weights, self._model, self._hooks, once)
        finally:
            for tensor, known in retained:
                tensor.grad = known
        self._known.endings.add(separation.ending)

    def receive(self, name: str, gradient: Tensor) -> None:
        """A parameter received a gradient."""
        self._received.add(name)
        for check in self._checks():
            check.receive(name, gradient)

    def computed(self, names: Iterable[str], dtype: torch.dtype, roundings: float = 0.0) -> None:
        """Parameters were used in a call whose output has this precision."""
        for check in self._checks():
            check.computed(names, dtype, roundings)

    def term(self, names: frozenset[str], along_random: Tensor) -> None:
        """A use of parameters gave a term: what it comes to along `random`, (batch,)."""
        self._along_random.append((names, along_random))

    def conclude(self, explained: set[str], constant: set[str]) -> list[str]:
        """The capture ends.

        Args:
            explained: parameters that have a term, or of which none is needed.
            constant: parameters of uses that were the same whatever the examples are.

        Returns:
            The parameters that received a gradient.

        Raises:
            RuntimeError: there was no backward, or a gradient that the terms do not explain.
        """
        if not self._received:
            raise RuntimeError(
                "no gradient reached the model's parameters inside capture(): run the backward of "
                "a loss that depends on the model inside it, without set_to_none in between"
            )
        if missed := self._received - explained:
            raise RuntimeError(_dead(missed) if missed <= constant else unexplained(missed))
        if self.verifying:
            self._exact.compare(self._along_random, self.random)
        return sorted(self._received)

    def failed(self) -> None:
        """Nothing of the capture counts as verified."""
        self._proof.forget(self._signatures)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """What one process refuses in the block all do, where they share parameters."""
        if self._sharded is None:
            yield
            return
        try:
            yield
        except (RuntimeError, ValueError):
            self._ranks.failed()
            raise
        self._ranks.done(lambda: None)

    def along(self, args: Any, kwargs: Any) -> None:
        """This process refuses the pass, and repeats it as long as another one does."""
        with contextlib.suppress(RuntimeError):  # another refuses it, too
            self._in_step(args, kwargs)

    def release(self) -> None:
        """The capture is over."""
        self._retaining.clear()

    def _checks(self) -> list[SumCheck]:
        return [self.sums, self._exact] if self.verifying else [self.sums]

    def _verify(
        self, watch: Watch[Any], args: Any, kwargs: Any, batch: int, due: bool
    ) -> tuple[int, int] | None:
        """Verify where it is due; where it is due for another process, repeat its passes."""
        if not due and not self._ranks.together:
            return None
        with watch.resting(), without(watch), saved_apart(), self._same_order():
            found = None
            with self._ranks.told():
                if due:
                    self._signatures.append(self._signature)
                    self.verifying = True
                    found = verify(
                        self._known, self._model, watch.nodes, args, kwargs, batch, self._ranks
                    )
            self._in_step(args, kwargs)
            return found

    def _in_step(self, args: Any, kwargs: Any) -> None:
        with self._same_order():
            self._ranks.done(lambda: repeat(self._model, args, kwargs))

    def _same_order(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._sharded is None else self._sharded.same_order()

    def _signed(self, tensors: list[Tensor]) -> object:
        """What two forward passes must have in common for what was verified to hold for both."""
        check_inputs(tensors)
        return (
            tuple((t.shape, t.dtype) for t in tensors),
            tuple(module.training for module in self._model.modules()),
            frozenset(self._parameters),
            torch.is_autocast_enabled(tensors[0].device.type),
        )


def _dead(names: set[str]) -> str:
    first, *rest = sorted(names)
    listed = repr(first) + (f" and {len(rest)} others" if rest else "")
    return (
        f"parameter {listed} received a gradient, but what it was used with is the same whatever "
        "the examples are: the units before it are dead (a ReLU that gives zeros alone, after a "
        "step that was too large?), so that nothing tells the examples apart. Lower the learning "
        "rate or clip gradients; initialise the layer before it anew, or freeze the parameter"
    )
