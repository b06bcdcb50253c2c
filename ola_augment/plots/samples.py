"""What transforms make of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.kernels.pixel_format import pixel_format
from ola_augment.plots.figure import new_figure
from ola_augment.space import SearchSpace
from ola_augment.summary import magnitude_text
from ola_augment.transforms import PolicyTransform

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Draws that are looked at for some that change an image.
_TRIES = 4096


def augmented_samples(
    augment: PolicyTransform,
    images: Tensor,
    draws: int = 4,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Plot images beside augmented versions of them, each labelled with what was drawn.

    Only draws that apply something are shown, the most likely of them first; the title says how
    many images they are.

    Args:
        augment: whose policy draws.
        images: (B, C, H, W), as the transform takes them; one row of the figure each.
        draws: augmented versions of each image, at least 1.
        labels: B class names; None writes "original".

    Returns:
        A figure of B rows and 1 + ``draws`` columns.

    Raises:
        ValueError: no images, no draws, or labels of another number.

    Example:
        >>> from ola_augment import UniformAugment
        >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> figure = augmented_samples(UniformAugment(), images, labels=["cat", "dog"])
    """
    _check_labels(images, labels)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    rows, share = len(images), 0.0
    columns: list[tuple[Tensor, list[str]]] = []
    actions, share = _draw_something(augment, rows * draws)
    # Sorted within each image: example i * draws + j is the j-th of image i.
    order = actions.log_prob.view(rows, draws).argsort(dim=1, descending=True, stable=True)
    order = order + draws * torch.arange(rows, device="cpu")[:, None]
    for chosen in order.T:
        drawn = actions.select(chosen)
        texts = describe(drawn, augment.space, *images.shape[-2:])
        columns.append((augment.replay(images, drawn), texts))
    figure = new_figure(figsize=(1.75 * (draws + 1), 2.1 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, draws + 1, squeeze=False)
    originals = list(labels) if labels is not None else ["original"] * rows
    for row, axes_of_row in enumerate(grid):
        _show(axes_of_row[0], images[row], originals[row], augment)
        for axes, (pictures, texts) in zip(axes_of_row[1:], columns, strict=True):
            _show(axes, pictures[row], texts[row], augment)
    name = type(augment).__name__
    figure.suptitle(f"{name}: something is applied to {100 * share:.0f} % of images, most likely"
                    " first", fontsize=11)  # fmt: skip
    return figure


def sample_strip(
    augments: Mapping[str, PolicyTransform], images: Tensor, labels: Sequence[str] | None = None
) -> Figure:
    """Plot images in a row, and under them what each of several transforms makes of them.

    As for :func:`augmented_samples`, only draws that apply something are shown.

    Args:
        augments: transforms by the title of their row.
        images: (B, C, H, W), as the transforms take them; one column of the figure each.
        labels: B class names; None writes none.

    Returns:
        A figure of B columns: a row of originals, and one for each transform.

    Raises:
        ValueError: no images, no transform, or labels of another number.

    Example:
        >>> from ola_augment import OLAAugment, UniformAugment
        >>> images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
        >>> figure = sample_strip({"uniform": UniformAugment(), "learned": OLAAugment()}, images)
    """
    _check_labels(images, labels)
    if not augments:
        raise ValueError("augments must hold at least one transform, got none")
    rows = [("original", images, next(iter(augments.values())))]
    for title, augment in augments.items():
        actions, _ = _draw_something(augment, len(images))
        rows.append((title, augment.replay(images, actions), augment))
    figure = new_figure(figsize=(1.15 * len(images) + 1.2, 1.2 * len(rows) + 0.25))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for number, (axes_of_row, row) in enumerate(zip(grid, rows, strict=True)):
        title, pictures, augment = row
        for column, axes in enumerate(axes_of_row):
            text = labels[column] if labels is not None and number == 0 else ""
            _show(axes, pictures[column], text, augment)
        axes_of_row[0].text(
            -0.08, 0.5, title, transform=axes_of_row[0].transAxes, ha="right", va="center",
            fontsize=11, parse_math=False,
        )  # fmt: skip
    return figure


def _check_labels(images: Tensor, labels: Sequence[str] | None) -> None:
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels must be one for each of {len(images)} images, got {len(labels)}")


def _draw_something(augment: PolicyTransform, n: int) -> tuple[Actions, float]:
    """Actions of n examples that apply something, and the share of all draws that do.

    A policy that (almost) never applies anything shows what it draws.
    """
    actions = augment.policy.sample(max(_TRIES, 2 * n), augment.generator)
    changes = [o.name != "identity" or o.kernel is not None for o in augment.space.operations]
    applied = (actions.keep & torch.tensor(changes, device="cpu")[actions.ops]).any(1)
    # Stable: among those that apply something, and those that do not, in the order of the draws.
    first = applied.int().argsort(dim=0, descending=True, stable=True)[:n]
    return actions.select(first), float(applied.double().mean())


def _show(axes: Axes, image: Tensor, title: str, augment: PolicyTransform) -> None:
    """Three channels are colours; others are shown as their mean."""
    pixels = pixel_format(image.dtype, len(image), augment.value_range)
    picture = (image.float().cpu() - pixels.low) / (pixels.high - pixels.low)
    picture = picture.clamp(0, 1) if len(picture) == 3 else picture.mean(0, keepdim=True)
    axes.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=9, parse_math=False)  # a class may be called "$5"
    axes.set_axis_off()


def describe(actions: Actions, space: SearchSpace, height: int, width: int) -> list[str]:
    """Name what was drawn for each example, one operation and magnitude a line.

    Args:
        actions: of B examples.
        space: that they index.
        height: of the images in pixels, for magnitudes that scale with it.
        width: of the images in pixels.

    Returns:
        B texts; ``"unchanged"`` where nothing is applied.

    Example:
        >>> from ola_augment import OLAPolicy
        >>> policy = OLAPolicy()
        >>> actions = policy.sample(1)
        >>> actions.keep[:] = False
        >>> describe(actions, policy.space, 32, 32)
        ['unchanged']
    """
    table = space.magnitudes(height, width)
    texts = []
    for example in range(actions.batch_size):
        lines = []
        for slot in torch.nonzero(actions.keep[example]).flatten().tolist():
            index = int(actions.ops[example, slot])
            operation = space.operations[index]
            magnitude = table[index, int(actions.magnitude_bins[example, slot])]
            value = float(magnitude) * int(actions.signs[example, slot])
            lines.append(f"{operation.name} {magnitude_text(operation, value)}".rstrip())
        texts.append("\n".join(lines) or "unchanged")
    return texts
