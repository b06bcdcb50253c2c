"""What a run of ``examples/train.py`` can be asked for; imports nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

DESCRIPTION = """Train with learned augmentation, beside the comparison methods.

    python examples/train.py --method none randaugment uniform ola --seeds 3

Writes per run ``metrics.jsonl`` (and for ola ``evidence.txt``, ``policy.json`` and, where it
learned, ``policy.png``; for every method that augments ``samples.png``) and prints one table. A run
that was killed goes on where it was, with the same result, when the same command is given again
with ``--resume``.
"""
STRENGTHS = (0, 0.5, 1, 2, 4)
#: The methods that ola is compared with.
COMPARED = (
    *("none", "randaugment", "trivialaugment", "autoaugment", "uniform"),
    *(f"strength-{number}" for number in STRENGTHS),
)
#: Names of ``shifts.SHIFTS``.
SHIFTS = (
    *("rotated", "dark", "sheared", "shifted", "inverted", "washed-out", "blurred", "mirrored"),
    *("occluded", "small", "coarse", "noisy"),
)
DATA = ("digits", *(f"digits-{name}" for name in SHIFTS), "cifar10", "cifar100")
CONTROLS = ("shuffled", "uniform")

#: docs/results.md has the comparisons that the recommendation rests on.
SETTINGS: dict[str, dict[str, Any]] = {
    # That of OLALearner.recommended.
    "recommended": {
        "meta_lr": 0.03,
        "reference": "held-out",
        "strength": "tried",
        "learn_until": 1 / 6,
    },
    "paper": {"meta_lr": 0.1, "reference": "next", "strength": "learned", "learn_until": 1.0},
}
#: Pairs that teach enough (up to twice as many do): with more, a run only costs more.
ENOUGH_PAIRS = 250


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # None and flags have no default worth reading.
        if action.default in (None, False) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, what was not given filled in."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        formatter_class=Help,
        usage="%(prog)s [--data DATA] [--method METHOD ...] [--epochs N] [--out OUT] ...",
    )
    add = parser.add_argument
    add("--data", default="digits", help=f"{', '.join(DATA)} or imagefolder:PATH")
    add("--train-size", type=at_least(1), help="train on this many random images (default: all)")
    add(
        "--image-size",
        type=at_least(1),
        default=32,
        help="pixels a side of a folder's images, scaled and cropped",
    )
    methods = [*COMPARED, "ola"]
    add(
        "--method",
        nargs="+",
        choices=methods,
        default=["uniform", "ola"],
        metavar="METHOD",
        help=f"any of {', '.join(methods)}",
    )
    add("--space", choices=["wide_long", "rand_augment"], default="wide_long", help="operations")
    add("--model", default="small_cnn", help="small_cnn, wrn-DEPTH-WIDTH or torchvision's names")
    add("--epochs", type=at_least(1), default=100, help="passes over the training images")
    add("--batch-size", type=at_least(1), default=64, help="images a step")
    add("--lr", type=float, default=0.05, help="SGD with Nesterov momentum, cosine to 0")
    add("--weight-decay", type=float, default=5e-4, help="of SGD")
    add(
        "--cutout",
        type=at_least(0),
        default=0,
        help="zero a square of that many pixels a side; Table 2's recipe: 16",
    )
    add("--no-mirror", action="store_true", help="no horizontal flips in the pre-processing")
    add(
        "--interleave",
        action="store_true",
        help="the comparison methods augment every other batch, as ola does, and not every one",
    )
    add(
        "--seeds",
        type=at_least(1),
        default=1,
        help="how many runs of each method (seeds 0, 1, ...)",
    )
    add("--device", default="cpu", help="cpu, cuda or mps")
    add("--out", type=Path, default=Path("runs/train"), help="a folder for what is written")
    add("--resume", action="store_true", help="go on with runs that were stopped, from --out")
    add("--checkpoint-every", type=at_least(1), default=500, help="batches between checkpoints")
    add("--quiet", action="store_true", help="no progress bars")
    add("--traceback", action="store_true", help="show where an error comes from")
    add_options(parser)
    options = parser.parse_args(arguments)
    fill_in(options)
    return options


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--settings", choices=SETTINGS, default="recommended", help="what is not given below")
    add("--meta-lr", type=float, help="of the policy's Adam: 0.03, or the paper's 0.1")
    add("--entropy-weight", type=float, default=0.0, help="beyond the paper, which has none")
    add(
        "--reference",
        choices=["next", "current", "held-out"],
        help="gradient that is aligned with: of the plain batch after the augmented update (the "
        "paper) or before it, or the running mean of that of images held out: the data's reference "
        "images, or --held-out",
    )
    add(
        "--strength",
        type=strength,
        help="applied operations an image: a number; 'tried' on held-out images, with and without "
        "augmentation in turns; 'steered' by a thermostat from 1; or 'learned' (the paper); with "
        "all but the last the policy learns which operations, by values",
    )
    add(
        "--learn-every",
        type=at_least(1),
        help="learn from every N-th pair of steps (default: with images held out so that some "
        f"{ENOUGH_PAIRS} teach, else 1)",
    )
    add(
        "--learn-until",
        type=float,
        help="share of the epochs; held-out images join the training after it, and with a strength "
        "operations are drawn uniformly until then",
    )
    add(
        "--held-out",
        type=at_least(1),
        help="training images held out if the data has no reference (default: a fifth, at most "
        "256)",
    )
    add(
        "--control",
        choices=CONTROLS,
        help="shuffled: rewards of other examples of the batch; uniform: operations stay alike, "
        "their strength is tried",
    )


def at_least(least: int) -> Callable[[str], int]:
    """A type of whole numbers for argparse, which tells its message."""

    def whole(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}: {text}")
        return int(text)

    return whole


def strength(text: str) -> str | float:
    named = ("tried", "steered", "learned")
    try:
        return text if text in named else float(text)
    except ValueError:
        choice = f"must be a number, {named[0]}, {named[1]} or {named[2]}: {text}"
        raise argparse.ArgumentTypeError(choice) from None


def fill_in(options: argparse.Namespace) -> None:
    """Take from --settings what was not given."""
    of_gradients = [name for name in ("meta_lr", "entropy_weight") if getattr(options, name)]
    for name, value in SETTINGS[options.settings].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if of_gradients and options.strength != "learned":
        raise ValueError(
            f"--{of_gradients[0].replace('_', '-')} is of a policy that learns by gradients: give "
            "--strength learned, or --settings paper"
        )
    if options.strength == "tried" and options.reference != "held-out":
        raise ValueError(
            f"--strength tried needs --reference held-out, not {options.reference}: give a number, "
            "steered or learned"
        )
    if options.control and options.strength == "learned":
        raise ValueError("--control is one of values: give a --strength")
    if not 0 < options.learn_until <= 1:
        raise ValueError(f"--learn-until must lie in (0, 1], got {options.learn_until}")


def is_recommended(options: argparse.Namespace) -> bool:
    """Whether nothing of the recommended setting was changed."""
    named = SETTINGS["recommended"].items()
    return options.learn_every is None and all(getattr(options, n) == value for n, value in named)


def described(options: argparse.Namespace) -> str:
    """The settings of a run of OLA, for the line above a table."""
    every = options.learn_every or 1
    learns = f"learning from every {every}. pair" if every > 1 else ""
    until = (
        f"learning for the first {options.learn_until:.2g} of the epochs"
        if options.learn_until < 1
        else ""
    )
    parts = (
        f"control {options.control}" if options.control else "",
        f"reference {options.reference}",
        f"strength {options.strength}",
        f"meta lr {options.meta_lr}" * (options.strength == "learned"),
        f"entropy weight {options.entropy_weight}" * bool(options.entropy_weight),
        learns,
        until,
    )
    return "ola: " + ", ".join(part for part in parts if part)
