"""Pictures of a policy over time and of what it does to images (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.space import SearchSpace
from ola_augment.transforms import PolicyTransform

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def policy_over_time(history: Sequence[dict[str, Any]], space: SearchSpace) -> Figure:
    """Plot how a policy moved: number of operations, keep probabilities, mean magnitude bins.

    Args:
        history: what :func:`ola_augment.training.fit` returned for a policy that learns.
        space: of the policy.

    Raises:
        ValueError: a history without policy metrics.
    """
    from matplotlib.figure import Figure

    if not history or "keep_probs" not in history[0]:
        raise ValueError("history must come from fit(..., updater=...), got no policy in it")
    epochs = [record["epoch"] for record in history]
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(space) - 0.5, -0.5)
    figure = Figure(figsize=(15, 0.22 * len(space) + 1.6), layout="constrained")
    counts, keeps, magnitudes = figure.subplots(1, 3)

    for index, probs in enumerate(
        zip(*(record["num_ops_probs"] for record in history), strict=True)
    ):
        counts.plot(epochs, probs, label=f"{index + 1}")
    counts.set(title="number of operations", xlabel="epoch", ylabel="probability", ylim=(0, 1))
    counts.legend(title="operations")

    for axes, key, title, top in (
        (keeps, "keep_probs", "probability to keep an operation", 1),
        (magnitudes, "mean_magnitude_bins", "mean magnitude bin", space.num_magnitude_bins - 1),
    ):
        table = torch.tensor([record[key] for record in history]).T.numpy()
        picture = axes.imshow(
            table, aspect="auto", extent=extent, vmin=0, vmax=top, interpolation="nearest"
        )
        axes.set(title=title, xlabel="epoch")
        names = [operation.name for operation in space.operations]
        axes.set_yticks(range(len(space)), names, fontsize=8)
        figure.colorbar(picture, ax=axes)
    return figure


def augmented_samples(augment: PolicyTransform, images: Tensor, draws: int = 4) -> Figure:
    """Plot images before and after augmentation, each labelled with what was drawn.

    Args:
        augment: whose policy draws.
        images: (B, C, H, W), one row of the figure each.
        draws: augmented versions of each image.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * (draws + 1), 2.2 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), draws + 1, squeeze=False)
    columns = [(images, ["original"] * len(images))]
    for _ in range(draws):
        augmented, actions = augment.augment(images)
        labels = describe(actions, augment.space, *images.shape[-2:])
        columns.append((augmented, labels))
    for axes_of_row, row in zip(grid, range(len(images)), strict=True):
        for axes, (pictures, labels) in zip(axes_of_row, columns, strict=True):
            picture = pictures[row].permute(1, 2, 0).cpu().numpy()
            top = 255 if pictures.dtype == torch.uint8 else 1
            axes.imshow(picture, cmap="gray", vmin=0, vmax=top)
            axes.set_title(labels[row], fontsize=7)
            axes.set_axis_off()
    return figure


def describe(actions: Actions, space: SearchSpace, height: int, width: int) -> list[str]:
    """Name what was drawn for each example, one operation and magnitude a line."""
    table = space.magnitudes(height, width)
    texts = []
    for example in range(actions.batch_size):
        lines = []
        for slot in torch.nonzero(actions.keep[example]).flatten().tolist():
            index = int(actions.ops[example, slot])
            operation = space.operations[index]
            magnitude = table[index, int(actions.magnitude_bins[example, slot])]
            value = float(magnitude) * int(actions.signs[example, slot])
            lines.append(operation.name + (f" {value:.3g}" if operation.low is not None else ""))
        texts.append("\n".join(lines) or "unchanged")
    return texts


def split_usage(results: Sequence[dict[str, Any]], epochs: int) -> Figure:
    """Plot the usage of noisy and other splits over training, and the losses (Figure 2).

    Args:
        results: runs with ``net``, ``method``, ``usage`` (T pairs: noisy, others) and ``losses``
            (T numbers); runs of the same net and method become a mean and a band of all seeds.
        epochs: that the T points span.

    Raises:
        ValueError: no runs.
    """
    from matplotlib.figure import Figure

    if not results:
        raise ValueError("results must hold at least one run, got none")
    nets = list(dict.fromkeys(run["net"] for run in results))
    methods = list(dict.fromkeys(run["method"] for run in results))
    figure = Figure(figsize=(4 * len(nets), 6), layout="constrained")
    grid = figure.subplots(2, len(nets), squeeze=False, sharex=True)
    for column, net in enumerate(nets):
        usage_axes, loss_axes = grid[0, column], grid[1, column]
        for number, method in enumerate(methods):
            runs = [run for run in results if (run["net"], run["method"]) == (net, method)]
            if not runs:
                continue
            usage = torch.tensor([run["usage"] for run in runs])
            losses = torch.tensor([run["losses"] for run in runs])
            curves = (
                (usage_axes, usage[..., 0].numpy(), "-", f"{method}, noisy"),
                (usage_axes, usage[..., 1].numpy(), "--", f"{method}, others"),
                (loss_axes, losses.numpy(), "-", method),
            )
            for axes, values, style, label in curves:
                x = torch.linspace(0, epochs, values.shape[1]).numpy()
                axes.plot(x, values.mean(0), style, color=f"C{number}", label=label)
                axes.fill_between(x, values.min(0), values.max(0), color=f"C{number}", alpha=0.15)
        usage_axes.set(title=net, ylim=(0, 1.02), ylabel="usage")
        loss_axes.set(xlabel="epoch", ylabel="training loss")
        usage_axes.legend(fontsize=7)
        loss_axes.legend(fontsize=7)
    return figure
