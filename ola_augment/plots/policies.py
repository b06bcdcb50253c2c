"""A policy as it is, and how it came to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ola_augment.plots.colors import COLORS, DIVERGING
from ola_augment.plots.figure import new_figure
from ola_augment.policy import Policy
from ola_augment.space import SearchSpace
from ola_augment.summary import Favour, favour, magnitude_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure


def policy_over_time(history: Sequence[Mapping[str, Any]], space: SearchSpace) -> Figure:
    """Plot how a policy moved: which operations it prefers, and how many it draws.

    Args:
        history: what :func:`ola_augment.training.fit` returned for a policy that learns; or one
            dict for each moment, with ``epoch`` and :func:`~ola_augment.training.policy_metrics`.
        space: of the policy.

    Returns:
        A figure. On the left an operation a row, sorted by its last probability (of being kept, or
        of being drawn where the policy draws some more often than others), which stands at the
        end; white is where it started. On the right the probability of 1 .. S operations, or, where
        that number is given, how many of them are applied.

    Raises:
        ValueError: a history without policy metrics, or of another space.

    Example:
        >>> from ola_augment import OLAPolicy
        >>> from ola_augment.training import policy_metrics
        >>> policy = OLAPolicy()
        >>> figure = policy_over_time([{"epoch": 1, **policy_metrics(policy)}], policy.space)
    """
    if not history or "keep_probs" not in history[0]:
        raise ValueError("history must come from fit(..., learner=...), got no policy in it")
    names = [operation.name for operation in space.operations]
    if (found := list(history[0]["keep_probs"])) != names:
        raise ValueError(f"history is of the operations {found}, the space has {names}")
    draws = "draw_probs" in history[0]
    key, verb, start = (
        ("draw_probs", "draw", 1 / len(names)) if draws else ("keep_probs", "keep", 0.5)
    )
    epochs = [record["epoch"] for record in history]
    last = history[-1][key]
    names.sort(key=lambda name: -last[name])
    figure = new_figure(figsize=(10, 0.26 * len(names) + 1.6), layout="constrained")
    preferred, counts = figure.subplots(1, 2, width_ratios=(3, 2))

    half = (epochs[-1] - epochs[0]) / max(1, len(epochs) - 1) / 2 or 0.5
    extent = (epochs[0] - half, epochs[-1] + half, len(names) - 0.5, -0.5)
    table = [[record[key][name] for record in history] for name in names]
    picture = preferred.imshow(
        table,
        cmap=DIVERGING,
        norm=_around(start, max(2 * start, *(max(row) for row in table))),
        aspect="auto",
        extent=extent,
        interpolation="nearest",
    )
    preferred.set_yticks(range(len(names)), names)
    title = f"probability to {verb} an operation, start {start:.2g}"
    preferred.set(title=title, xlabel="epoch")
    numbers = preferred.secondary_yaxis("right")
    numbers.set_yticks(range(len(names)), [f"{last[name]:.2f}" for name in names])
    numbers.tick_params(length=0)
    figure.colorbar(picture, ax=preferred, aspect=40, pad=0.02)

    counts.set(xlabel="epoch", xlim=(epochs[0], max(epochs[-1], epochs[0] + 1)))
    if draws:
        counts.plot(epochs, [record["applied_ops"] for record in history], color=COLORS[0])
        counts.set(title="operations applied to an image", ylim=(0, None))
    else:
        _numbers_drawn(counts, epochs, [record["num_ops_probs"] for record in history])
    for side in ("top", "right"):
        counts.spines[side].set_visible(False)
    return figure


def _around(start: float, largest: float) -> TwoSlopeNorm:
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(start, vmin=0, vmax=largest)


def _numbers_drawn(axes: Axes, epochs: list[int], table: list[list[float]]) -> None:
    """A line for each number of operations, labelled at its end."""
    lines = list(zip(*table, strict=True))
    for number, line in enumerate(lines):
        axes.plot(epochs, line, color=COLORS[number % len(COLORS)], linewidth=2)
    place = -1.0
    for number in sorted(range(len(lines)), key=lambda number: lines[number][-1]):
        place = max(lines[number][-1], place + 0.05)  # apart, where they would overlap
        axes.annotate(
            f"{number + 1} ({lines[number][-1]:.2f})",
            (epochs[-1], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[number % len(COLORS)],
            annotation_clip=False,
        )
    title = "operations drawn for an image"
    axes.set(title=title, ylabel="probability", ylim=(0, max(1.0, place + 0.03)))


def policy_tables(
    policies: Policy | Mapping[str, Policy], height: int = 32, width: int = 32
) -> Figure:
    """Plot what policies do now, side by side: which operations they prefer, and magnitudes.

    Args:
        policies: one, or several over the same operations by their titles, which are sorted by the
            preference of the last one.
        height: of the images in pixels, for magnitudes that scale with it.
        width: of the images in pixels.

    Returns:
        A figure: for each policy the probability of keeping each operation (or of drawing it, where
        some are drawn more often than others) as a bar from where it started, with its number; then
        the distribution of the magnitude of each operation that takes one.

    Raises:
        ValueError: no policy, or policies over different operations.

    Example:
        >>> from ola_augment import OLAPolicy, UniformPolicy
        >>> figure = policy_tables({"uniform": UniformPolicy(), "learned": OLAPolicy()})
    """
    if isinstance(policies, Policy):
        policies = {"": policies}
    spaces = [policy.space for policy in policies.values()]
    if not spaces or any(space.operations != spaces[0].operations for space in spaces):
        raise ValueError("policies must be at least one, all over the same operations")
    with torch.no_grad():
        tables = {title: policy.log_probs() for title, policy in policies.items()}
    favours = {title: favour(table.keep, table.ops) for title, table in tables.items()}
    last = list(favours.values())[-1].probs
    order = torch.argsort(last, descending=True, stable=True).tolist()

    size = (2.4 * len(tables) + 5.2, 0.28 * len(order) + 1.5)
    figure = new_figure(figsize=size, layout="constrained")
    ratios = [2.4] * len(tables) + [4]
    grid = figure.subplots(1, len(tables) + 1, sharey=True, width_ratios=ratios)
    for axes, (title, favoured) in zip(grid, favours.items(), strict=False):
        axes.set_title(f"{title}\n{favoured.verb} with probability".lstrip("\n"), parse_math=False)
        _bars(axes, favoured, order)
    names = [spaces[0].operations[index].name for index in order]
    grid[0].set_yticks(range(len(order)), names)
    grid[0].set_ylim(len(order) - 0.4, -0.6)
    magnitudes = {title: table.magnitude.exp() for title, table in tables.items()}
    _magnitudes(grid[-1], magnitudes, spaces[0], order, (height, width))
    for axes in grid:
        axes.tick_params(left=False, labelleft=axes is grid[0])
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    return figure


def _bars(axes: Axes, favoured: Favour, order: Sequence[int]) -> None:
    """Probabilities as bars from their start."""
    from matplotlib import colormaps

    start = favoured.start
    largest = max(2 * start, float(favoured.probs.max()))
    norm = _around(start, largest)
    for row, index in enumerate(order):
        p = float(favoured.probs[index])
        more = p >= start
        # Pale colours near the start would not be seen on white.
        color = colormaps[DIVERGING](0.5 + (0.12 if more else -0.12) + 0.76 * (norm(p) - 0.5))
        axes.barh(row, p - start, left=start, height=0.8, color=color)
        axes.annotate(
            f"{p:.2f}",
            (p, row),
            xytext=(3 if more else -3, 0),
            textcoords="offset points",
            ha="left" if more else "right",
            va="center",
            fontsize=9,
        )
    axes.axvline(start, color="0.3", linewidth=0.8)
    room = 0.22 * largest
    ticks = (0, start, largest)
    axes.set(xlim=(-room, largest + room))
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])


def _magnitudes(
    axes: Axes,
    tables: Mapping[str, Tensor],
    space: SearchSpace,
    order: Sequence[int],
    size: tuple[int, int],
) -> None:
    """One row an operation that takes a magnitude: its density, from the first bin to the last.

    Each row has its own scale, on which uniform is never higher than two fifths.
    """
    # Times the number of bins: 1 is uniform whatever the bins.
    scaled = [table * table.shape[1] for table in tables.values()]
    named = False
    for row, index in enumerate(order):
        operation = space.operations[index]
        if operation.low is None:
            continue
        base, top = row + 0.42, max(2.5, *(float(table[index].max()) for table in scaled))
        for number, (title, table) in enumerate(zip(tables, scaled, strict=True)):
            edges = torch.linspace(0, 1, table.shape[1] + 1, device="cpu").tolist()
            last = number == len(scaled) - 1
            axes.stairs(
                (base - 0.85 / top * table[index]).tolist(),
                edges,
                baseline=base,
                color=COLORS[number % len(COLORS)],
                fill=last,
                alpha=0.6 if last else 1,
                label=None if named else title,
            )
        named = True
        for magnitude_bin, x, side in ((0, -0.02, "right"), (1, 1.02, "left")):
            end = operation.magnitude(magnitude_bin, 2, *size)
            sign = "±" * (operation.signed and end != 0)
            text = sign + magnitude_text(operation, end)
            axes.text(x, row + 0.2, text, ha=side, va="center", fontsize=8, color="0.35")
    axes.set(title="magnitude, if it has one", xlim=(-0.22, 1.25), xticks=())
    axes.spines["bottom"].set_visible(False)
    if len(tables) > 1:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(tables), frameon=False,
            fontsize=9,
        )  # fmt: skip
