"""What ``train.py`` and ``demo.py`` tell a person: the data, what is left, errors, a verdict."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Pairs of steps of a run that ola is made for.
_WORTH_HAVING = 1000
Runs = Mapping[str, Sequence[Mapping[str, float]]]


def command(main: Callable[[], None]) -> int:
    """Run a script's main; a mistake in what was asked for is one line, not a traceback."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    return 0


def look_for_packages(seeds: int) -> None:
    """Import what pictures and intervals need before a run needs it."""
    from ola_augment.extras import needs

    with needs("demo"):
        import matplotlib  # noqa: F401

        if seeds > 1:
            import scipy  # noqa: F401


def data_lines(data: Any, given: int | None = None) -> str:
    """Classes, counts and sizes of a data set, and what was done to its images."""
    from ola_augment.training.given import counted

    channels, height, width = data.train_images.shape[1:]
    color = "grey" if channels == 1 else "colour"
    train, size = len(data.train_images), f"{height} x {width} pixels, {color}"
    parts = [f"{train} training" if given is None else f"{given} of {train} training"]
    parts.append(f"{len(data.test_images)} test")
    if data.reference is not None:
        known = counted(len(data.reference[0]), "labelled image")
        parts.append(f"{known} of the target domain")
    classes = "1 class" if data.num_classes == 1 else f"{data.num_classes} classes"
    lines = [f"{data.name}: {classes}, {', '.join(parts)}; {size}"]
    if data.num_classes == 1:
        lines.append("every answer is right: a classifier needs two classes or more")
    counts = data.train_labels.bincount(minlength=data.num_classes).tolist()
    if max(counts) > 2 * max(1, min(counts)):
        lines.append(f"images a class differ: {min(counts)} to {max(counts)}")
    parts_of = {"test": data.test_labels}
    if data.reference is not None:
        parts_of["reference"] = data.reference[1]
    for part, labels in parts_of.items():
        names = data.classes or tuple(map(str, range(data.num_classes)))
        missing = [name for label, name in enumerate(names) if label not in labels]
        if missing:
            lines.append(f"no {part} images of {listed(missing)}")
    return "\n".join([*lines, *data.notes])


def listed(names: Sequence[str], most: int = 5) -> str:
    """Such as a, b and 3 more."""
    more = len(names) - most
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:most])} and {more} more"


def check_device(device: str) -> None:
    """Refuse a device that is not there, before anything is written.

    Raises:
        ValueError: torch cannot put a tensor there.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def too_short(images: int, batch_size: int, epochs: int) -> str:
    """What a run lacks for its trial, in a sentence; empty where it is long enough."""
    from ola_augment.training.given import counted
    from ola_augment.training.trial import SHORTEST_RUN

    steps = max(1, images // batch_size)
    pairs = epochs * steps // 2
    if pairs >= _WORTH_HAVING:
        return ""
    whole, verb = counted(epochs, "epoch"), "is" if epochs == 1 else "are"
    have = f"{whole} of {counted(steps, 'step')} {verb} {counted(pairs, 'pair')} of steps"
    enough, few = (-(-2 * number // steps) for number in (_WORTH_HAVING, SHORTEST_RUN))
    if pairs < SHORTEST_RUN:
        return (
            f"ola will augment nothing: {have}, and it tries augmentation in runs of "
            f"{SHORTEST_RUN} or more (--epochs {few}); {_WORTH_HAVING} are better "
            f"(--epochs {enough})"
        )
    return (
        f"a short run for ola: {have}, {_WORTH_HAVING} are better (--epochs {enough}); where its "
        "trial sees nothing either way, augmentation can cost accuracy"
    )


def duration(seconds: float) -> str:
    """Such as 45 s or 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def run_line(name: str, result: Mapping[str, float], left: int, done: Sequence[float]) -> str:
    """A run that has ended, how many are left, and for how long, given the seconds of each."""
    text = f"{name}: {100 * result['accuracy']:.1f} % in {duration(result['seconds'])}"
    if skipped := result.get("skipped"):
        text += f"; {skipped:.0f} steps skipped, not finite: try a lower --lr"
    if left:
        text += f"; {left} left, about {duration(left * statistics.mean(done))}"
    return text


def check_out(out: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds runs with other options, before anything is written.

    Raises:
        FileExistsError: it does; the message names an option that differs.
    """
    for name in names:
        known = out / name / "options.json"
        if not known.exists():
            continue
        if text := another_option(known, settings):
            raise FileExistsError(f"{out / name} holds a run with {text}; choose another --out")


def another_option(known: Path, settings: Mapping[str, Any]) -> str:
    """An option that differs from those of a run before, in words; empty where none does."""
    there, asked = json.loads(known.read_text()), json.loads(json.dumps(settings))
    for key in {**there, **asked}:
        if (old := there.get(key)) != (new := asked.get(key)):
            return f"another --{key.replace('_', '-')}: {old!r} there, {new!r} now"
    return ""


def one_a_class(images: Any, labels: Any, most: int = 6) -> tuple[Any, list[int]]:
    """The first image of each class, of ``most`` classes spread over all; and the classes."""
    present = labels.unique().tolist()
    step = max(1, len(present) // most)
    chosen = present[::step][:most]
    index = [int((labels == label).nonzero()[0]) for label in chosen]
    return images[index], chosen


def difference(runs: Runs, one: str, other: str) -> tuple[float, float]:
    """Points by which a method is ahead of another, seed by seed, and half its 95 % interval."""
    pairs = zip(runs[one], runs[other], strict=True)
    points = [100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs]
    if len(points) < 2:
        return statistics.mean(points), float("inf")
    from scipy.stats import t

    half = t.ppf(0.975, len(points) - 1) * statistics.stdev(points) / len(points) ** 0.5
    return statistics.mean(points), float(half)


def verdict(runs: Runs) -> str:
    """What the table says of ola, in one sentence; empty where there is nothing to compare."""
    others = [name for name in runs if name != "ola"]
    if "ola" not in runs or not others:
        return ""

    def accuracy(name: str) -> float:
        return statistics.mean(run["accuracy"] for run in runs[name])

    best = max(others, key=accuracy)
    points, half = difference(runs, "ola", best)
    if half == float("inf"):
        where = "as good as"
        if abs(points) >= 0.05:
            where = f"{abs(points):.1f} points {'ahead of' if points > 0 else 'behind'}"
        return f"ola is {where} {best}, the best of the others; one seed proves nothing."
    if points > half:
        return f"ola is ahead of {best}, the next best, by {points:.1f} ± {half:.1f} points."
    if points < -half:
        what = "augment less." if best == "none" else f"take {best}."
        return f"{best} is ahead of ola by {-points:.1f} ± {half:.1f} points: {what}"
    return f"ola ties with {best}, the best of the others: {points:+.1f} ± {half:.1f} points."
