"""What FSDP2 does around forward and backward passes, followed while a capture lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ola_augment.alignment._fsdp.forms import groups_of, states
from ola_augment.alignment._fsdp.reference import Along

#: Calls one of FSDP's hooks, with what it is given and the parameters that are whole after it.
Follow = Callable[[Callable[[], Any], Any, Callable[[], Mapping[str, nn.Parameter]]], Any]


class Group:
    """Parameters that are whole at the same time, those of one call of ``fully_shard``.

    Attributes:
        parameters: FSDP's own entries, by name.
    """

    def __init__(self, state: Any) -> None:
        self.state = state
        self.parameters: dict[str, Any] = {}

    def whole(self) -> dict[str, nn.Parameter]:
        """The trained ones as their modules read them, of those that were whole before."""
        return {
            name: one._unsharded_param
            for name, one in self.parameters.items()
            if hasattr(one, "_unsharded_param") and one.sharded_param.requires_grad
        }

    @contextlib.contextmanager
    def followed(self, follow: Follow, along: Along) -> Iterator[None]:
        """Inside, FSDP's hooks are called by ``follow``, and g is whole when they are."""
        state, [module] = self.state, self.state._modules
        hooks = (
            (module._forward_pre_hooks, state._pre_forward_hook_handle.id),
            (module._forward_hooks, state._post_forward_hook_handle.id),
        )
        (before, first), (after, last) = hooks
        original = before[first], after[last]
        backward, [group] = state._pre_backward, groups_of(state)
        end = group.post_backward
        following = True

        def pre_forward(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return follow(lambda: original[0](module, args, kwargs), (args, kwargs), self.whole)

        def post_forward(module: nn.Module, args: Any, output: Any) -> Any:
            return follow(lambda: original[1](module, args, output), output, dict)

        def pre_backward(gradient: Tensor) -> Tensor:
            if _LOOKING:
                return gradient
            backward(gradient)
            if following:
                along.gather({name: one.dtype for name, one in self.whole().items()})
            return gradient

        def post_backward(*arguments: Any) -> None:
            if not _LOOKING:
                along.release(self.parameters)
                end(*arguments)

        before[first], after[last] = pre_forward, post_forward
        state._pre_backward, group.post_backward = pre_backward, post_backward
        try:
            yield
        finally:
            following = False
            before[first], after[last] = original
            del state._pre_backward, group.post_backward


#: Not empty while gradients are taken that are no backward pass of FSDP's.
_LOOKING: list[bool] = []


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Gradients are taken through a graph, and FSDP thinks of no backward."""
    _LOOKING.append(True)
    try:
        yield
    finally:
        _LOOKING.pop()


def is_custom(node: object) -> bool:
    """Whether a node of a graph is a user's Function; FSDP's own change no gradient."""
    function = getattr(type(node), "_forward_cls", None)
    home = getattr(function, "__module__", None) or ""
    return isinstance(node, BackwardCFunction) and not home.startswith("torch.distributed.fsdp")


class Sharded:
    """A model under ``fully_shard``, in a form that is not refused."""

    def __init__(self, model: nn.Module) -> None:
        self._states = states(model.modules())
        found: dict[int, tuple[Group, Any]] = {}
        self.groups = [Group(state) for state in self._states]
        for group in self.groups:
            for own in groups_of(group.state):
                for one in own.fsdp_params:
                    found[id(one.sharded_param)] = group, one
                    if hasattr(one, "_unsharded_param"):
                        found[id(one._unsharded_param)] = group, one
        for name, parameter in model.named_parameters():
            group, one = found[id(parameter)]
            group.parameters[name] = one
        self.groups = [group for group in self.groups if group.parameters]

    def entries(self) -> dict[str, Any]:
        """FSDP's own, by the names of the parameters."""
        return {name: one for group in self.groups for name, one in group.parameters.items()}

    def whole(self) -> dict[str, nn.Parameter]:
        """The parameters as modules read them, of those that were whole before."""
        return {name: one for group in self.groups for name, one in group.whole().items()}

    @contextlib.contextmanager
    def followed(self, follow: Follow, along: Along) -> Iterator[None]:
        """See `Group.followed`."""
        with contextlib.ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.followed(follow, along))
            yield

    @contextlib.contextmanager
    def same_order(self) -> Iterator[None]:
        """Passes without backward: the order in which FSDP fetches ahead comes back."""
        known = {id(order): list(order) for order in self._orders()}
        try:
            yield
        finally:
            for order in self._orders():  # the first pass of all makes new ones
                order[:] = known.get(id(order), [])

    def _orders(self) -> list[list[Any]]:
        return [
            *(state._comm_ctx.post_forward_order for state in self._states),
            *(own._post_forward_indices for state in self._states for own in groups_of(state)),
        ]
