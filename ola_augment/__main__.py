"""``python -m ola_augment``: the versions that a report of a problem needs."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from ola_augment import __version__

NEEDED = ("torch", "torchvision", "numpy", "pillow", "numba", "backpack-for-pytorch")
OPTIONAL = ("kornia", "lightning", "transformers", "timm")


def versions() -> str:
    """One line a package: ours, Python, what it needs, and the optional ones that are installed."""
    lines = [f"ola_augment {__version__}", f"Python {platform.python_version()}"]
    for name in (*NEEDED, *OPTIONAL):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name in NEEDED:
                lines.append(f"{name} is not installed")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print them.

    Args:
        arguments: of the command line; ``--version`` prints the package's own version alone.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ola_augment", description="Print the versions that matter for a report."
    )
    parser.add_argument("--version", action="version", version=f"ola_augment {__version__}")
    parser.parse_args(arguments)
    print(versions())


if __name__ == "__main__":
    main()
