"""Policies as JSON files: readable, no pickle."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ola_augment.logits import LogitsModule
from ola_augment.operation import Operation
from ola_augment.policy import Policy
from ola_augment.space import SearchSpace

FORMAT = "ola_augment/policy/2"
_FIRST_FORMAT = "ola_augment/policy/1"  # an OLAPolicy, without its kind
_FIELDS = ("name", "low", "high", "integer", "signed", "side", "per")
#: Written where it is given: files without it are those of operations that have none.
_UP_TO = "up_to"

# No policy needs more; a small file must not ask for much memory.
_MOST_BYTES = 64 * 2**20
_MOST_ENTRIES = 1_000_000
#: What entries of another type or size raise on their way into a policy.
_MALFORMED = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError)


def save_policy(
    policy: LogitsModule, path: str | Path, *, transform: Mapping[str, Any] | None = None
) -> None:
    """Write a policy of any kind: search space, arguments and logits.

    A user's own kernels are not written; pass the space to :func:`load_policy` to get them back.
    A user's own kind of policy needs ``arguments()``, the JSON values that its constructor takes
    after the space.

    Args:
        policy: a :class:`Policy` or :class:`SplitPolicy`.
        path: of the file, replaced if it is there.
        transform: JSON values of the transform that draws from it.

    Raises:
        TypeError: no policy, or one whose kind does not define ``arguments()``.
        OSError: the file cannot be written; an old one is untouched.

    Example:
        >>> import tempfile
        >>> from ola_augment import OLAPolicy
        >>> path = Path(tempfile.mkdtemp()) / "policy.json"
        >>> save_policy(OLAPolicy(strength=1.5), path)
        >>> load_policy(path).strength
        1.5
    """
    if not isinstance(policy, LogitsModule):
        raise TypeError(f"policy must be a Policy or SplitPolicy, got {type(policy).__name__}")
    try:
        arguments = policy.arguments()
    except NotImplementedError as error:
        raise TypeError(f"policy cannot be saved: {error}") from None
    content = {
        "format": FORMAT,
        "kind": policy.kind,
        "space": _describe(policy.space) if isinstance(policy, Policy) else None,
        "arguments": arguments,
        "logits": {name: logits.tolist() for name, logits in policy.state_dict().items()},
    }
    if transform is not None:
        content["transform"] = dict(transform)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file that is at any moment the old one or the new one, whole and on the disk.

    Raises:
        OSError: it cannot be written (a full disk, no directory); the old file is untouched.
    """
    path = Path(path).resolve()  # a link stays one
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(6)}")
    try:
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(number)
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name, too, must survive a power cut
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_policy(path: str | Path, space: SearchSpace | None = None) -> Any:
    """Read a policy written by :func:`save_policy`.

    Args:
        path: of the JSON file.
        space: with the operations of the file, for spaces with a user's own kernels.

    Returns:
        A policy of the kind that was written.

    Raises:
        ValueError: not such a file, a kind that is not known (a user's own must be imported
            first), logits that do not fit or are not finite, or a ``space`` with other operations
            than the file's.
    """
    content = _read(Path(path))
    try:
        described, kind = content["space"], LogitsModule.kinds[content["kind"]]
        arguments = content["arguments"]
        if described is not None:
            if space is None:
                operations = tuple(Operation(**entry) for entry in described["operations"])
                bins = described["num_magnitude_bins"]
                space = SearchSpace(operations, bins, described["name"])
            arguments = {"space": space, **arguments}
        policy = kind(**arguments)
        logits = {
            name: torch.tensor(values, dtype=torch.float32, device="cpu")
            for name, values in content["logits"].items()
        }
    except _MALFORMED as error:
        raise ValueError(f"{path} is not a complete policy file: {error!r}") from error
    if space is not None and (
        described is None or _describe(space)["operations"] != described["operations"]
    ):
        names = described and [entry["name"] for entry in described["operations"]]
        raise ValueError(
            f"{path} was written for other operations or magnitudes than those of space "
            f"{space.name!r}: {names}"
        )
    expected = {name: tuple(value.shape) for name, value in policy.state_dict().items()}
    if (found := {name: tuple(value.shape) for name, value in logits.items()}) != expected:
        raise ValueError(f"{path} holds logits of shapes {found}, the policy needs {expected}")
    if not all(bool(values.isfinite().all()) for values in logits.values()):
        raise ValueError(f"{path} holds logits that are NaN or Inf")
    try:
        policy.load_state_dict(logits)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its policy: {error}") from error
    return policy


def read_transform(path: str | Path) -> dict[str, Any]:
    """What :func:`save_policy` was told of the transform; empty if nothing.

    Raises:
        ValueError: not such a file.
    """
    settings = _read(Path(path)).get("transform", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a complete policy file: transform is {settings!r:.40}")
    return settings


def describe_policy(policy: LogitsModule) -> str:
    """Kind, arguments and space of a policy as JSON: equal where logits are interchangeable."""
    content = {
        "kind": policy.kind,
        "space": _describe(policy.space) if isinstance(policy, Policy) else None,
        "logits": {name: list(logits.shape) for name, logits in policy.named_logits().items()},
    }
    return json.dumps(content)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} is not a policy file: it is larger than {_MOST_BYTES} bytes")
    try:
        content = json.loads(data.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a policy file: {error}") from error
    formats = (FORMAT, _FIRST_FORMAT)
    if not isinstance(content, dict) or content.get("format") not in formats:
        raise ValueError(f"{path} is not a policy file: its format is not {FORMAT!r}")
    if content["format"] == _FIRST_FORMAT:
        arguments = {"max_ops": content.get("max_ops")}
        content = {**content, "kind": "OLAPolicy", "arguments": arguments}
    _check_size(path, content)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the entry {twice!r} occurs twice")
    return found


def _check_size(path: Path, content: dict[str, Any]) -> None:
    """Refuse what would ask for much memory, before anything is made of it."""
    space, arguments = content.get("space"), content.get("arguments")
    sizes = {}
    if isinstance(arguments, dict):
        sizes = {f"arguments.{name}": value for name, value in arguments.items()}
    if isinstance(space, dict):
        operations, bins = space.get("operations"), space.get("num_magnitude_bins")
        sizes["space.num_magnitude_bins"] = bins
        if isinstance(operations, list) and isinstance(bins, int):
            sizes["entries of the magnitude table"] = bins * len(operations)
    for name, value in sizes.items():
        if isinstance(value, (int, float)) and not abs(value) <= _MOST_ENTRIES:
            raise ValueError(f"{path}: {name} is {str(value)[:20]}, more than {_MOST_ENTRIES}")


def _describe(space: SearchSpace) -> dict[str, Any]:
    operations = [
        {field: getattr(operation, field) for field in _FIELDS}
        | ({} if operation.up_to is None else {_UP_TO: operation.up_to})
        for operation in space.operations
    ]
    return {
        "name": space.name,
        "num_magnitude_bins": space.num_magnitude_bins,
        "operations": operations,
    }
