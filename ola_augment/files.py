"""Policies as JSON files: readable, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ola_augment.operation import Operation
from ola_augment.policy import OLAPolicy
from ola_augment.space import SearchSpace

FORMAT = "ola_augment/policy/1"
_FIELDS = ("name", "low", "high", "integer", "signed", "side", "per")


def save_policy(policy: OLAPolicy, path: str | Path) -> None:
    """Write a learned policy: its search space and logits.

    A user's own kernels are not written; pass the space to :func:`load_policy` to get them back.

    Raises:
        TypeError: not an :class:`OLAPolicy`.
    """
    if not isinstance(policy, OLAPolicy):
        raise TypeError(f"policy must be an OLAPolicy, got {type(policy).__name__}")
    content = {
        "format": FORMAT,
        "space": _describe(policy.space),
        "max_ops": policy.max_ops,
        "logits": {name: logits.tolist() for name, logits in policy.state_dict().items()},
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_policy(path: str | Path, space: SearchSpace | None = None) -> OLAPolicy:
    """Read a policy written by :func:`save_policy`.

    Args:
        path: of the JSON file.
        space: with the operations of the file, for spaces with a user's own kernels.

    Raises:
        ValueError: not such a file, logits that do not fit or are not finite, or a ``space``
            with other operations than the file's.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a policy file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a policy file: its format is not {FORMAT!r}")
    try:
        described = content["space"]
        if space is None:
            operations = tuple(Operation(**entry) for entry in described["operations"])
            bins = described["num_magnitude_bins"]
            space = SearchSpace(operations, bins, described["name"])
        policy = OLAPolicy(space, content["max_ops"])
        logits = {
            name: torch.tensor(values, dtype=torch.float32)
            for name, values in content["logits"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a complete policy file: {error!r}") from error
    if _describe(space)["operations"] != described["operations"]:
        raise ValueError(
            f"{path} was written for other operations or magnitudes than those of space "
            f"{space.name!r}: {[entry['name'] for entry in described['operations']]}"
        )
    expected = {name: tuple(value.shape) for name, value in policy.state_dict().items()}
    if (found := {name: tuple(value.shape) for name, value in logits.items()}) != expected:
        raise ValueError(f"{path} holds logits of shapes {found}, the space needs {expected}")
    if not all(bool(values.isfinite().all()) for values in logits.values()):
        raise ValueError(f"{path} holds logits that are NaN or Inf")
    policy.load_state_dict(logits)
    return policy


def _describe(space: SearchSpace) -> dict[str, Any]:
    operations = [
        {field: getattr(operation, field) for field in _FIELDS} for operation in space.operations
    ]
    return {
        "name": space.name,
        "num_magnitude_bins": space.num_magnitude_bins,
        "operations": operations,
    }
