"""The alignment engine on many models, each against its oracle: exact, refused or wrong.

Per model and mode (evaluation, training): two captures in a row in double precision, batches of 4,
random weights, a random reference gradient; the truth is one autograd.grad per example's loss from
the same random states. Where BatchNorm mixes the examples the sum of the alignments is compared,
and then, with its statistics held, every example. Each model runs in a process of its own.

    python examples/zoo/run.py --jobs 2 --limit 900 --table docs/_zoo_table.md
    python examples/zoo/run.py --only 'swin|beit'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import handwritten_cases
import timm_cases
import torch
import transformers_cases
from check import Case, Verdict, check

KINDS: dict[str, dict[str, Callable[[], Case]]] = {
    "timm": timm_cases.CASES,
    "transformers": transformers_cases.CASES,
    "handwritten": handwritten_cases.CASES,
}
MARKS = {"wrong": "**wrong**", "crashed": "**crashed**"}
#: From worst to best; "not finished" within the time limit says nothing about the engine.
ORDER = ("wrong", "crashed", "broken", "not finished", "refused", "exact")
Verdicts = dict[str, Verdict]


def _work(make: Callable[[], Case], fallback: bool, pipe: Connection) -> None:
    # What models print and warn about is none of ours.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            verdicts = check(make(), fallback)
        except Exception as error:
            verdicts = dict.fromkeys(("eval", "train"), Verdict("broken", cause=repr(error)[:300]))
    pipe.send(verdicts)


def judge(make: Callable[[], Case], fallback: bool, limit: float) -> Verdicts:
    """Check one model in a child process."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(make, fallback, sending))
    process.start()
    sending.close()
    verdict = Verdict("not finished", cause=f"took more than {limit:.0f} s")
    try:
        if receiving.poll(limit):
            return receiving.recv()
    except EOFError:
        verdict = Verdict("crashed", cause="the process died")
    finally:
        process.kill()
        process.join()
    return dict.fromkeys(("eval", "train"), verdict)


def _worst(verdicts: Verdicts) -> str:
    return min((v.status for v in verdicts.values()), key=ORDER.index)


def _row(kind: str, name: str, verdicts: Verdicts) -> str:
    marks = [MARKS.get(verdicts[mode].status, verdicts[mode].status) for mode in ("eval", "train")]
    error = max(v.error for v in verdicts.values())
    causes = dict.fromkeys(v.cause.replace("|", "/") for v in verdicts.values() if v.cause)
    cause = textwrap.shorten("; ".join(causes), 200, placeholder=" ...")
    size = f"{error:.0e}" if error else ""
    return f"| {kind} | {name} | {marks[0]} | {marks[1]} | {size} | {cause} |"


def main(arguments: list[str] | None = None) -> int:
    """Run the zoo; 1 where a model is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression over kind/name")
    parser.add_argument("--jobs", type=int, default=1, help="models at the same time")
    parser.add_argument("--limit", type=float, default=300, help="seconds a model may take")
    parser.add_argument("--fallback", action="store_true", help="differentiate what has no rule")
    parser.add_argument("--table", type=Path, help="write the markdown table here")
    parser.add_argument("--json", type=Path, help="write the verdicts here")
    options = parser.parse_args(arguments)
    chosen = [
        (kind, name, make)
        for kind, cases in KINDS.items()
        for name, make in cases.items()
        if re.search(options.only, f"{kind}/{name}", re.IGNORECASE)
    ]
    # Loaded once, for all children.
    for kind in {kind for kind, *_ in chosen} & {"timm", "transformers"}:
        __import__(kind)

    def one(case: tuple[str, str, Callable[[], Case]]) -> tuple[str, str, Verdicts]:
        kind, name, make = case
        started = time.perf_counter()
        verdicts = judge(make, options.fallback, options.limit)
        seconds = time.perf_counter() - started
        print(f"{_row(kind, name, verdicts)} {seconds:.0f} s", flush=True)
        return kind, name, verdicts

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(one, chosen))
    summary = _summary(results)
    print("\n" + summary)
    if options.table:
        head = "| | model | evaluation | training | error | cause |\n|---|---|---|---|---:|---|\n"
        rows = "\n".join(_row(*result) for result in results)
        options.table.write_text(f"{summary}\n\n{head}{rows}\n")
    if options.json:
        found = {f"{k}/{n}": {m: vars(v) for m, v in vs.items()} for k, n, vs in results}
        options.json.write_text(json.dumps(found, indent=1))
    return int(any(_worst(v) in ("wrong", "crashed") for *_, v in results))


def _summary(results: list[tuple[str, str, Verdicts]]) -> str:
    lines = [
        "| | models | " + " | ".join(reversed(ORDER)) + " |",
        "|---" + "|---:" * (len(ORDER) + 1) + "|",
    ]
    for kind in KINDS:
        counts = Counter(_worst(v) for k, _, v in results if k == kind)
        columns = [counts[status] for status in reversed(ORDER)]
        total = sum(counts.values())
        if total:
            lines.append(f"| {kind} | {total} | " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
