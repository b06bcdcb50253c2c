"""What a check or measurement found, as one row of the table, and pictures to try it on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Row:
    """``ok`` is None where a number is only reported."""

    part: str
    what: str
    found: str
    goal: str = ""
    ok: bool | None = None


def emit(row: Row) -> None:
    """Print a row for the program that collects them."""
    print("ROW " + json.dumps(asdict(row)), flush=True)


def check(part: str, what: str, goal: str, function: Callable[[], tuple[bool, str]]) -> None:
    """Run a check; an error is what was found, and the next check follows."""
    try:
        ok, found = function()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        ok, found = False, f"{type(error).__name__}: {lines[0][:150]}"
    emit(Row(part, what, found, goal, ok))


def pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """(count, 3, side, side) uint8: smooth colours, some with noise, one flat, one checkered."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(count, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    smooth[::2] += 20 * torch.randn(smooth[::2].shape, generator=generator)
    images = smooth.clamp(0, 255).round().to(torch.uint8)
    if count > 2:
        images[-1] = 77
        images[-2] = 255 * ((torch.arange(side)[:, None] + torch.arange(side)) % 2).to(torch.uint8)
    return images


def seconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """The fastest of some calls, the device's work included, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
