"""Logits: what a policy learns, held by a module and yet no parameters of it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.multiprocessing import get_sharing_strategy

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


class LogitsModule(nn.Module):
    """A module whose own parameters are logits: a meta-optimizer's business, not the model's.

    What is assigned as an ``nn.Parameter`` becomes a logits tensor. A model that holds the module
    has it in its ``state_dict``, but not among its ``parameters()`` or ``buffers()``: optimizers,
    weight decay, averaging and ``DistributedDataParallel`` pass it by. Logits lie on the CPU, where
    policies draw, in shared memory, so that DataLoader workers see them change; copies and
    unpickled modules have shared logits of their own. They are float32, or float64 after
    ``double()``; other dtypes and devices asked for are ignored. ``load_state_dict`` always copies
    into them, ``assign=True`` or not, and refuses NaN and Inf.

    ``train()`` and ``eval()`` change nothing, as for torchvision's transforms.
    """

    #: Every kind by its name in policy files: a user's own with its module.
    kinds: ClassVar[dict[str, type[LogitsModule]]] = {}
    kind: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ours = cls.__module__.startswith("ola_augment.")
        cls.kind = cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"
        LogitsModule.kinds[cls.kind] = cls

    def __init__(self) -> None:
        super().__init__()
        self._logits: dict[str, nn.Parameter] = {}
        self._process = os.getpid()  # whose memory the logits are in
        self._is_copy = False  # of a policy in another process, which it does not see change

    def arguments(self) -> dict[str, Any]:
        """Arguments that make a module of this kind again, without space and logits; for files.

        Returns:
            Argument name -> JSON value.

        Raises:
            NotImplementedError: a user's own kind that does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define arguments()")

    def named_logits(self) -> dict[str, nn.Parameter]:
        """The logits of this module and of any submodules.

        Returns:
            Name -> trainable tensor, float32 or float64, on the CPU.
        """
        return {**self._logits, **dict(self.named_parameters())}

    def requires_grad_(self, requires_grad: bool = True) -> LogitsModule:
        """Freeze or unfreeze the logits; freezing a model that holds the module does not.

        Args:
            requires_grad: False freezes them.

        Returns:
            The module itself.
        """
        for logits in self.named_logits().values():
            logits.requires_grad_(requires_grad)
        return self

    def learns_here(self, alone: bool) -> None:
        """Say that this process changes the logits.

        Args:
            alone: leave the memory of the process that this one was started from, and keep the
                values. What is started from now on shares with this one.
        """
        self._is_copy = False
        if alone and self._process != os.getpid():
            for name, logits in self.named_logits().items():
                logits.data = logits.data.clone()
                _share(name, logits)
            self._process = os.getpid()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take an assigned parameter among the logits.

        Args:
            name: of the attribute.
            param: floating point; moved to the CPU, in float32 or float64.

        Raises:
            TypeError: no parameter, or not a floating-point one.
        """
        if "_logits" not in self.__dict__:
            raise AttributeError("cannot assign logits before Module.__init__() call")
        if not isinstance(param, nn.Parameter) or not param.is_floating_point():
            kind = param.dtype if isinstance(param, Tensor) else type(param).__name__
            raise TypeError(f"{name} must be a floating-point nn.Parameter, got {kind}")
        param = _writable(param)
        if param.dtype not in (torch.float32, torch.float64) or param.device.type != "cpu":
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            param.data = param.data.to("cpu", dtype)
        _share(name, param)
        self._logits[name] = param

    def __getattr__(self, name: str) -> Any:
        logits = self.__dict__.get("_logits", {})
        return logits[name] if name in logits else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_logits", {}) and not isinstance(value, nn.Parameter):
            raise TypeError(
                f"{name} must be an nn.Parameter, got {type(value).__name__}; to set its values: "
                f"with torch.no_grad(): policy.{name}.copy_(values)"
            )
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._logits]  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not all(logits.is_shared() for logits in self._logits.values()):  # type: ignore[no-untyped-call]
            self._is_copy = self._process != os.getpid()
            self._process = os.getpid()
        for name, logits in self._logits.items():
            self._logits[name] = logits = _writable(logits)
            _share(name, logits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogitsModule:
        for name, logits in self._logits.items():
            dtype = fn(torch.empty(0, dtype=logits.dtype, device="cpu")).dtype
            if dtype != logits.dtype and dtype in (torch.float32, torch.float64):
                with torch.inference_mode(False):
                    logits.data, logits.grad = logits.data.to(dtype), None
                _share(name, logits)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # Copies: who averages the entries of a state_dict in place does not write to the logits.
        for name, logits in self._logits.items():
            destination[prefix + name] = logits if keep_vars else logits.detach().clone()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest, values = dict(state_dict), {}
        for name, logits in self._logits.items():
            key = prefix + name
            if key not in rest:
                missing_keys += [key] * strict
                continue
            value = rest.pop(key)
            if not isinstance(value, Tensor) or value.shape != logits.shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                error_msgs.append(f"{key} must have shape {tuple(logits.shape)}, got {found}")
            elif not value.isfinite().all():
                error_msgs.append(f"{key} holds NaN or Inf")
            values[name] = value
        if not error_msgs:
            with torch.no_grad():
                for name, value in values.items():
                    self._logits[name].copy_(value)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def warn_if_unshared(module: LogitsModule) -> None:
    """Say, in a process that others started, that it does not see the logits change."""
    named = module.named_logits()
    lost = [name for name, logits in named.items() if not logits.is_shared()]  # type: ignore[no-untyped-call]
    if lost:
        warnings.warn(_unshared(lost), stacklevel=2)
    elif module._is_copy and any(logits.requires_grad for logits in named.values()):
        warnings.warn(
            f"{', '.join(named)}: copied from another process, as by Ray Data and grain; this one "
            "keeps drawing with what it was started with. Load with torch's DataLoader, or "
            "freeze() a policy that need not change",
            stacklevel=2,
        )


def started_by_another() -> bool:
    """Whether this process loads data for another: of multiprocessing, or of Ray."""
    return multiprocessing.parent_process() is not None or "ray" in sys.modules


def _writable(logits: nn.Parameter) -> nn.Parameter:
    """Logits that can be learned, also if they were made in inference mode."""
    if not logits.is_inference():
        return logits
    with torch.inference_mode(False):
        return nn.Parameter(logits.detach().clone(), logits.requires_grad)


def _share(name: str, logits: nn.Parameter) -> None:
    if logits.is_shared():  # type: ignore[no-untyped-call]
        return  # with the strategy "file_system" a second call would move it
    _warn_of_open_files()
    try:
        logits.share_memory_()  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError) as error:
        warnings.warn(f"{_unshared([name])} ({error})", stacklevel=3)


def zero_logits(*shape: int, requires_grad: bool = True) -> nn.Parameter:
    """Logits of nothing learned, in float32 whatever the default dtype and device are."""
    zeros = torch.zeros(shape, dtype=torch.float32, device="cpu")
    return nn.Parameter(zeros, requires_grad=requires_grad)


def _unshared(names: list[str]) -> str:
    return (
        f"{', '.join(names)}: not in shared memory, DataLoader workers keep drawing with what they "
        "were started with; change logits in place (logits.copy_(values) under torch.no_grad())"
    )


def _warn_of_open_files() -> None:
    """Say that open files run out, of which each tensor in shared memory is one."""
    if resource is None or get_sharing_strategy() != "file_descriptor":  # type: ignore[no-untyped-call]
        return
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(2)  # a new file takes the lowest number that is free
    os.close(lowest)
    if most != resource.RLIM_INFINITY and lowest >= 0.9 * most:
        warnings.warn(
            f"some {lowest} of {most} files that this process may have are open, and every policy "
            "keeps a few, for the memory that it shares with workers: delete policies that are "
            'not needed, raise the limit ("ulimit -n"), or call '
            'torch.multiprocessing.set_sharing_strategy("file_system")',
            stacklevel=5,
        )
