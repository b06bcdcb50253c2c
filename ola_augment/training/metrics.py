"""What is measured of a run: the policy as numbers with names, accuracy, one line of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.kernels.pixel_format import DTYPES
from ola_augment.policy import Policy
from ola_augment.training.restored import evaluating


def policy_metrics(policy: Policy) -> dict[str, Any]:
    """Probabilities of a policy as plain numbers, for metrics and plots.

    Args:
        policy: of any kind.

    Returns:
        ``entropy`` (nats), ``applied_ops`` (expected number an image), ``num_ops_probs`` (S
        numbers, of drawing 1 .. S operations), ``keep_probs`` (operation name -> probability), of
        a policy that draws some more often than others ``draw_probs`` (likewise), and
        ``mean_magnitude_bins`` (name -> mean bin, of the operations that take a magnitude).

    Example:
        >>> from ola_augment import OLAPolicy
        >>> policy_metrics(OLAPolicy("rand_augment"))["keep_probs"]["rotate"]
        0.5
    """
    operations = policy.space.operations
    names = [operation.name for operation in operations]
    with torch.no_grad():
        log_probs = policy.log_probs()
        bins = torch.arange(policy.space.num_magnitude_bins, device=log_probs.keep.device)
        means = (log_probs.magnitude.exp() @ bins.to(log_probs.magnitude)).tolist()
        metrics = {
            "entropy": float(policy.entropy()),
            "applied_ops": float(policy.applied_ops()),
            "num_ops_probs": log_probs.num_ops.exp().tolist(),
            "keep_probs": dict(zip(names, log_probs.keep.exp().tolist(), strict=True)),
        }
        if log_probs.ops is not None:
            metrics["draw_probs"] = dict(zip(names, log_probs.ops.exp().tolist(), strict=True))
    metrics["mean_magnitude_bins"] = {
        o.name: mean for o, mean in zip(operations, means, strict=True) if o.low is not None
    }
    return metrics


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics with their path as the name, as tables and loggers want them.

    Example:
        >>> flatten({"epoch": 1, "keep_probs": {"rotate": 0.9}, "num_ops_probs": [0.3, 0.7]})
        {'epoch': 1, 'keep_probs/rotate': 0.9, 'num_ops_probs/1': 0.3, 'num_ops_probs/2': 0.7}
    """
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, (list, tuple)):
            value = {str(number): entry for number, entry in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def plain_numbers(value: Any) -> Any:
    """Numbers of NumPy and torch as Python's, in any nesting, for files.

    Example:
        >>> plain_numbers({"accuracy": torch.tensor(0.5), "counts": torch.tensor([1, 2])})
        {'accuracy': 0.5, 'counts': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {name: plain_numbers(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(entry) for entry in value]
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def progress_text(metrics: Mapping[str, Any]) -> str:
    """Loss, accuracy and what the policy favours, if anything, in one short line.

    Example:
        >>> progress_text({"plain_accuracy": 0.913, "keep_probs": {"a": 0.9, "b": 0.5, "c": 0.1}})
        'accuracy 91.3 %, keeps a 0.90, drops c 0.10'
    """
    parts = []
    for name in ("accuracy", "plain_accuracy", "plain_loss"):
        if (value := metrics.get(name)) is not None:
            parts.append(
                f"accuracy {100 * value:.1f} %" if name != "plain_loss" else f"loss {value:.3f}"
            )
            break
    verbs, probs = ("draws", "seldom"), metrics.get("draw_probs")
    if not probs:
        verbs, probs = ("keeps", "drops"), metrics.get("keep_probs")
    if probs and min(probs.values()) < max(probs.values()):
        best, worst = max(probs, key=probs.__getitem__), min(probs, key=probs.__getitem__)
        parts += [f"{verbs[0]} {best} {probs[best]:.2f}", f"{verbs[1]} {worst} {probs[worst]:.2f}"]
    return ", ".join(parts)


def hits(outputs: Any, targets: Any) -> float | None:
    """Share of right predictions of a classifier's batch, (B, classes) and (B,); else None."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or not whole or not len(targets):
        return None
    return float((outputs.detach().argmax(1) == targets).float().mean())


def scale_to_float(images: Tensor) -> Tensor:
    """Images of integers to floats in [0, 1], of the default dtype; floating ones as they are.

    Args:
        images: of any shape; uint16 of the whole range of 16 bits, other integers of 0 .. 255.

    Returns:
        A tensor of the same shape.

    Raises:
        TypeError: int16, whose range only its user knows.
    """
    if images.is_floating_point():
        return images
    ends = DTYPES.get(images.dtype, (0, 255))
    if ends is None:
        raise TypeError(
            f"{str(images.dtype).removeprefix('torch.')} images have no black and white of their "
            "own: scale them in preprocess= (or loss=), lambda images: (images.float() - low) / "
            "(high - low)"
        )
    dtype = torch.get_default_dtype()
    wide = images.to(torch.promote_types(dtype, torch.float32))  # float16 ends below 65,535
    return (wide / ends[1]).to(dtype)


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    preprocess: Callable[[Tensor], Tensor] = scale_to_float,
) -> float:
    """Share of correct predictions in [0, 1], in evaluation mode; each part gets its mode back.

    Args:
        model: images -> (B, classes).
        batches: of images (B, C, H, W) and labels (B,).
        preprocess: images -> the model's input; by default integers are scaled to [0, 1].

    Returns:
        The share.

    Raises:
        ValueError: no examples.
    """
    device = next(model.parameters()).device
    correct = examples = 0
    with evaluating(model), torch.no_grad():
        for images, targets in batches:
            outputs = model(preprocess(images.to(device)))
            correct += int((outputs.argmax(1).cpu() == targets.cpu()).sum())
            examples += len(targets)
    if not examples:
        raise ValueError("batches must hold at least one example, got none")
    return correct / examples
