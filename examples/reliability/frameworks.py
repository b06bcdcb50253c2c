"""What each framework was seen to do: the tests that run it, and a table of what came of them.

    python examples/reliability/frameworks.py --out docs/_frameworks_table.md
    python examples/reliability/frameworks.py --out docs/_frameworks_table.md --only Ray

A cell holds "yes" where its tests passed, "FAILED" where one did not, "not run" where a package was
missing, and nothing where no test looks at it. ``--only`` leaves the other rows of the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = ("loop", "workers", "resume", "accumulation", "mixed precision", "ranks")
LIGHTNING = "test_integrations_lightning.py::test_"
HUGGINGFACE = "test_integrations_huggingface.py::test_"
MANY = "test_many_ranks.py::test_"
SHARDED = "test_sharded.py::test_"
LEARNS_SHARDED = f"{SHARDED}the_recommended_learner_learns"
OTHERS = "test_integrations_others.py::test_"
EXAMPLES = "test_integrations_examples.py::test_"
WAYS = "test_integrations_distributed.py::test_every_way_learns_the_same_policy_on_both_ranks"
ALL_LOOPS = f"{MANY}the_recommended_learner_is_one_on_all_ranks_and_in_all_loops"
#: Framework, its package, and for each column the beginnings of names of tests, under tests/.
FRAMEWORKS: dict[tuple[str, str], tuple[tuple[str, ...], ...]] = {
    ("a loop of one's own, DDP", "torch"): (
        ("test_learner.py::test_the_recommended_setting",),
        (f"{EXAMPLES}workers",),
        ("test_learner.py::test_stopped_after_every_pair_and_resumed",),
        ("test_learner.py::test_micro_batches_make_one_half",),
        (f"{EXAMPLES}compiled_and_mixed_precision",),
        (ALL_LOOPS, WAYS, f"{MANY}every_form_of_ddp", f"{MANY}three_ranks"),
    ),
    ("a loop of one's own, FSDP2", "torch"): (
        (LEARNS_SHARDED,),
        (),
        (LEARNS_SHARDED,),
        (f"{SHARDED}alignments_and_norms",),
        (f"{SHARDED}in_bfloat16",),
        (LEARNS_SHARDED, f"{SHARDED}what_one_rank_refuses"),
    ),
    ("`fit`", "torch"): (
        ("test_training.py::test_invert_which_swaps",),
        ("test_resume.py::test_batches_of_workers",),
        ("test_resume.py::test_stopped_at_every_step",),
        (),
        ("test_resume.py::test_a_scaler_changes_neither",),
        (WAYS,),
    ),
    ("Lightning", "lightning"): (
        (f"{LIGHTNING}the_recommended_learner", f"{LIGHTNING}held_out_images_join"),
        (f"{LIGHTNING}workers_augment",),
        (f"{LIGHTNING}stopped_and_resumed",),
        (f"{LIGHTNING}the_same_as_the_plain_loop", f"{LIGHTNING}an_update_that_the_epoch"),
        (f"{LIGHTNING}mixed_precision",),
        (ALL_LOOPS, WAYS, f"{OTHERS}lightning_forks_ranks"),
    ),
    ("Lightning, averaged weights", "lightning"): ((f"{OTHERS}averaged_weights",), *((),) * 5),
    ("Hugging Face Trainer", "transformers"): (
        (f"{HUGGINGFACE}the_recommended_learner", f"{HUGGINGFACE}held_out_images_join"),
        (f"{HUGGINGFACE}the_collator_augments",),
        (f"{HUGGINGFACE}stopped_and_resumed", f"{HUGGINGFACE}a_checkpoint_of_a_vit"),
        (f"{HUGGINGFACE}the_same_as_the_plain_loop", f"{HUGGINGFACE}the_epochs_last"),
        (f"{HUGGINGFACE}mixed_precision", f"{HUGGINGFACE}a_scaler"),
        (WAYS,),
    ),
    ("accelerate", "accelerate"): (
        (f"{EXAMPLES}accelerate", f"{OTHERS}accelerate_trains"),
        (f"{OTHERS}accelerate_with_workers",),
        (f"{OTHERS}accelerate_resumes",),
        (f"{OTHERS}accelerate_trains", f"{OTHERS}an_update_that_accelerate"),
        (f"{EXAMPLES}accelerate",),
        (WAYS, f"{OTHERS}a_notebook_launches_ranks"),
    ),
    ("Ray Train", "ray"): ((), (), (), (), (), (f"{EXAMPLES}ray",)),
    ("skorch", "skorch"): ((f"{OTHERS}skorch",), *((),) * 5),
    ("timm's Mixup", "timm"): ((f"{EXAMPLES}timm",), *((),) * 5),
}  # fmt: skip


class Outcomes:
    """What became of each test, for pytest."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the worst of its phases."""
        name = report.nodeid.removeprefix("tests/")
        if report.when == "call" or report.outcome != "passed":
            self.found[name] = "failed" if report.failed else report.outcome

    def cell(self, tests: tuple[str, ...]) -> str:
        """Of the table."""
        if not tests:
            return ""
        own = [[o for n, o in self.found.items() if n.startswith(test)] for test in tests]
        every = [outcome for outcomes in own for outcome in outcomes]
        if "failed" in every:
            return "FAILED"
        return "yes" if all(own) and "skipped" not in every else "not run"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--only", default="", help="frameworks whose name holds this text")
    options = parser.parse_args(arguments)
    rows = {key: cells for key, cells in FRAMEWORKS.items() if options.only in key[0]}
    wanted = sorted({test for cells in rows.values() for cell in cells for test in cell})
    os.chdir(ROOT)
    outcomes = Outcomes()
    names = " or ".join(sorted({test.split("::")[1] for test in wanted}))
    files = sorted({f"tests/{test.split('::')[0]}" for test in wanted})
    pytest.main(["-q", "-p", "no:randomly", "-k", names, *files], plugins=[outcomes])
    head = [f"| framework | version | {' | '.join(COLUMNS)} |", "|---" * 8 + "|"]
    known = options.out is not None and options.out.exists()
    old = options.out.read_text().splitlines()[2:] if known else []
    found = {line.split("|")[1].strip(): line for line in old}
    for (framework, package), cells in rows.items():
        try:
            number = f"{package} {version(package).partition('+')[0]}"
        except PackageNotFoundError:
            number = f"{package} (missing)"
        shown = " | ".join(map(outcomes.cell, cells))
        found[framework] = f"| {framework} | {number} | {shown} |"
    table = [found[framework] for framework, _ in FRAMEWORKS if framework in found]
    text = "\n".join(head + table) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    return int("FAILED" in text)


if __name__ == "__main__":
    sys.exit(main())
