"""What is refused before anything runs, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from ola_augment.alignment._fsdp import is_shard, refusal, shards_of
from ola_augment.alignment._torch import is_compiled

Modules = Sequence[tuple[str, nn.Module]]

_RECURRENT = "recurrent layers run as one fused function without an alignment rule"
_WAY_OUT = "freeze its parameters (requires_grad=False) or replace the layer"


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, each once.

    Those that processes share out are the shards, also while they are whole.
    """
    return _trainable(list(model.named_modules()))


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Frozen ones, too."""
    return _parameters(list(model.named_modules()))


def _trainable(modules: Modules) -> dict[str, nn.Parameter]:
    return {name: one for name, one in _parameters(modules).items() if one.requires_grad}


def _parameters(modules: Modules) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    shards = shards_of(module for _, module in modules)
    seen = set()
    for prefix, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                own = f"{prefix}.{name}" if prefix else name
                found[own] = shards.get(id(parameter), parameter)
    return found


def unwrapped(model: object) -> nn.Module:
    """The module that computes: the one inside DistributedDataParallel and ``torch.compile``.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif is_compiled(model):
            model = model._orig_mod
        else:
            return model
        assert isinstance(model, nn.Module)


def check_model(model: nn.Module, fallback: bool) -> dict[str, nn.Parameter]:
    """Refuse models that cannot be aligned exactly.

    Args:
        model: as given to the engine, `unwrapped`.
        fallback: functions without a rule are differentiated, so that recurrent layers may pass.

    Returns:
        The model's `trainable_parameters`.

    Raises:
        ValueError: no trainable parameter, or a refused layer, with its name and the way out.
    """
    modules = list(model.named_modules())  # once: it is done for every capture
    parameters = _trainable(modules)
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model {type(model).__name__} has no parameters")
    if not parameters:
        raise ValueError(
            f"model {type(model).__name__} has no trainable parameter: all have requires_grad=False"
        )
    for name, module in modules:
        reason = _refusal(module, fallback)
        if reason is not None:
            where = repr(name) if name else "the model itself"
            raise ValueError(f"layer {where} ({type(module).__name__}) cannot be aligned: {reason}")
    if (reason := refusal(model)) is not None:
        raise ValueError(reason)
    return parameters


def refuse_sharded(model: nn.Module) -> None:
    """Refuse parameters that processes share out, also while they are together.

    Between a forward pass without backward and the next step FSDP2 leaves the parameters of its
    root whole; they are no parameters that a hook or a copy survives.

    Raises:
        ValueError: naming one of them.
    """
    for name, parameter in all_parameters(model).items():
        if is_shard(parameter):
            raise ValueError(
                f"parameter {name!r} is sharded over processes (DTensor, FSDP), and this engine "
                "needs whole ones: use GradientAlignment, or DistributedDataParallel"
            )


def _refusal(module: nn.Module, fallback: bool) -> str | None:
    """Why a layer is refused, None where it is not."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    if any(issubclass(type(parameter), UninitializedParameter) for parameter in own):
        return "its parameters are not initialised yet; run the model once first"
    # Wrappers hide the calls inside them whether or not they own parameters.
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted code hides its calls; pass the Python module"
    if type(module).__name__.startswith("GradSampleModule"):
        return "Opacus's hooks need every activation for themselves; pass the module inside it"
    hooks = (*module._forward_hooks.values(), *module._backward_hooks.values())
    if any((getattr(hook, "__module__", None) or "").startswith("opacus.") for hook in hooks):
        return "Opacus's hooks are on it; remove them (GradSampleModule.remove_hooks()) first"
    if isinstance(module, DataParallel):
        return "its replicas are copies of the parameters; use DistributedDataParallel"
    if type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine", "PipelineEngine"):
        return "its parameters or gradients are sharded; use DistributedDataParallel"
    if not any(parameter.requires_grad for parameter in own):
        return None
    if isinstance(module, nn.EmbeddingBag):
        return f"its bags have no alignment rule; {_WAY_OUT}"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and not fallback:
        return f"{_RECURRENT}; {_WAY_OUT}, or pass fallback=True"
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        return "max_norm, scale_grad_by_freq and sparse gradients are not per example; unset it"
    return None
