"""What is private or undocumented in torch, each with its reason; tests hold them to it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

# ``tensor.grad = value`` reaches a TorchFunctionMode as this slot wrapper; zero_grad() is made of
# such calls.
SET_GRAD = vars(torch._C.TensorBase)["grad"].__set__


def in_backward() -> bool:
    """Whether autograd runs a backward pass now: checkpointing repeats forward calls inside one."""
    return torch._C._current_graph_task_id() != -1


def saved_apart() -> contextlib.AbstractContextManager[None]:
    """What a block saves for a backward pass a checkpoint around it does not count as its own."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def backward_id() -> int:
    """A number for the backward pass under way, -1 outside of one."""
    return torch._C._current_graph_task_id()


def collectives() -> int:
    """How many collectives there were so far, over all groups of processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return 0
    groups: Any = dist.distributed_c10d._world.pg_map
    return sum(group._get_sequence_number_for_group() for group in groups)


def gather_single(found: Tensor, sent: Tensor, group: Any = None) -> None:
    """One tensor of every process into one; torch 2.14 renamed the call, and warns of the old."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(found, sent, group=group)


def checkpoints_selectively() -> bool:
    """Whether what runs now is under selective checkpointing: it permits a single backward."""
    modes = range(torch._C._len_torch_dispatch_stack())
    return any(
        type(torch._C._get_dispatch_stack_at(i)).__name__ == "_CachingTorchDispatchMode"
        for i in modes
    )


def transforming() -> bool:
    """Whether a ``torch.func`` transform runs now."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def function_modes() -> list[Any]:
    """Torch function modes that are active now, the innermost last."""
    depth = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(index) for index in range(depth)]


def unwatched() -> contextlib.AbstractContextManager[None]:
    """Torch calls skip every mode: looking at a shape through one takes ten times as long."""
    nothing: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return nothing


def memory_of(tensor: Tensor) -> int:
    """A number for the memory that a tensor lies in, shared with its views.

    XLA's tensors have no address: there the tensor that they are views of stands for it.
    """
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return id(base_of(tensor))


@contextlib.contextmanager
def without(mode: TorchFunctionMode) -> Iterator[None]:
    """Calls skip a mode, where it is the innermost; nothing public takes one off for a while."""
    depth = torch._C._len_torch_function_stack()
    if depth and torch._C._get_function_stack_at(depth - 1) is mode:
        with _pop_mode_temporarily():
            yield
    else:
        yield


def _never(*_: object) -> bool:
    return False


_NO_DISPATCH = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never
)


def body_of(function: FunctionType) -> FunctionType:
    """A copy of a composite torch function that skips its own dispatch to modes.

    A torch function written in Python hands itself over to the active mode before it does anything
    else. With this copy a mode can run it and watch the calls inside it.
    """
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **_NO_DISPATCH},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def is_compiled(module: object) -> bool:
    """Whether a module is what ``torch.compile`` wraps around another; imports no compiler."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def backpack_is_active() -> bool:
    """Whether a backward now would run BackPACK's extensions; imports no BackPACK."""
    backpack = sys.modules.get("backpack.context")
    return backpack is not None and bool(backpack.CTX.get_active_exts())


def eagerly() -> contextlib.AbstractContextManager[object]:
    """Compiled modules and functions run as they were written; what is compiled stays so."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def base_of(tensor: Tensor) -> Tensor:
    """What a tensor is a view of, or the tensor; some subclasses would give a copy of the base."""
    with unwatched():
        return tensor if tensor._base is None else tensor._base


def on_gradient(output: Tensor, receive: Callable[[Tensor], None]) -> None:
    """Call with an output's gradient, as it enters the backward of what computed the output.

    That is behind the output's own gradient hooks. A view (what a linear layer on tokens gives) is
    looked at through its base: where it is written in place, then or later, autograd takes it for a
    write into the base, and the view's own node is no longer passed.
    """
    base = base_of(output)
    if base is output or base.dtype != output.dtype:
        base, own = output, None
    else:
        offset = output.storage_offset() - base.storage_offset()
        own = output.size(), output.stride(), offset
    size, stride, number = base.size(), base.stride(), base.output_nr

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        delta = gradients[number]
        if delta is not None and own is not None:
            if delta.stride() != stride:
                delta = delta.new_empty_strided(size, stride).copy_(delta)
            delta = delta.as_strided(*own[:2], delta.storage_offset() + own[2])
        if delta is not None:
            receive(delta)

    assert base.grad_fn is not None
    base.grad_fn.register_prehook(before)


@contextlib.contextmanager
def unnoticed_by_ddp(nodes: Iterable[Node]) -> Iterator[None]:
    """Gradients are taken through DistributedDataParallel's outputs, and it thinks of no backward.

    With ``static_graph=True`` the node behind its outputs has the gradients reduced at the end of
    the first backward that comes through, and never again: it keeps that in a flag.
    """
    wrapped = {id(ddp): ddp for node in nodes if (ddp := _ddp_of(node)) is not None}
    before = {
        key: ddp._static_graph_delay_allreduce_enqueued
        for key, ddp in wrapped.items()
        if ddp.static_graph
    }
    for key in before:
        wrapped[key]._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for key, flag in before.items():
            wrapped[key]._static_graph_delay_allreduce_enqueued = flag


def _ddp_of(node: Node) -> Any:
    reference = getattr(node, "ddp_weakref", None)
    return None if reference is None else reference()


def set_version(tensor: Tensor, version: int) -> None:
    """Set the counter of in-place changes, by which autograd knows what it saved is still valid."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def parametrization_cache() -> dict[Any, Any]:
    """What ``parametrize.cached()`` holds: tensors with the graph of whoever computed them."""
    return parametrize._cache


def computes_bfloat16_on_cpu() -> bool:
    """Whether the CPU has bfloat16 products; no public name before torch.cpu.get_capabilities."""
    supported: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())
