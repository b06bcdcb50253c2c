"""How a mixture of data sets is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ola_augment.plots.colors import COLORS
from ola_augment.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def split_usage(results: Sequence[dict[str, Any]], epochs: int) -> Figure:
    """Plot the usage of noisy and other splits over training, and the losses (Figure 2).

    Args:
        results: runs with ``net``, ``method``, ``usage`` (T pairs: noisy, others) and ``losses``
            (T numbers); runs of the same net and method become a mean and a band of all seeds.
        epochs: that the T points span.

    Returns:
        A figure: a column for each net, usage above losses, a line for each method.

    Raises:
        ValueError: no runs.

    Example:
        >>> run = {"net": "mlp", "method": "ola", "usage": [(0.6, 0.7), (0.1, 0.9)]}
        >>> figure = split_usage([{**run, "losses": [2.3, 0.9]}], epochs=1)
    """
    if not results:
        raise ValueError("results must hold at least one run, got none")
    nets = list(dict.fromkeys(run["net"] for run in results))
    methods = list(dict.fromkeys(run["method"] for run in results))
    figure = new_figure(figsize=(4 * len(nets), 6), layout="constrained")
    grid = figure.subplots(2, len(nets), squeeze=False, sharex=True)
    for column, net in enumerate(nets):
        usage_axes, loss_axes = grid[0, column], grid[1, column]
        for number, method in enumerate(methods):
            runs = [run for run in results if (run["net"], run["method"]) == (net, method)]
            if not runs:
                continue
            usage = torch.tensor([run["usage"] for run in runs], device="cpu")
            losses = torch.tensor([run["losses"] for run in runs], device="cpu")
            curves = (
                (usage_axes, usage[..., 0].numpy(), "-", f"{method}, noisy"),
                (usage_axes, usage[..., 1].numpy(), "--", f"{method}, others"),
                (loss_axes, losses.numpy(), "-", method),
            )
            for axes, values, style, label in curves:
                x = torch.linspace(0, epochs, values.shape[1], device="cpu").numpy()
                axes.plot(x, values.mean(0), style, color=COLORS[number % len(COLORS)], label=label)
                axes.fill_between(
                    x,
                    values.min(0),
                    values.max(0),
                    color=COLORS[number % len(COLORS)],
                    alpha=0.15,
                )
        usage_axes.set(title=net, ylim=(0, 1.02), ylabel="usage")
        loss_axes.set(xlabel="epoch", ylabel="training loss")
        usage_axes.legend(fontsize=7)
        loss_axes.legend(fontsize=7)
    return figure
