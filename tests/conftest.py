"""Options of the suite."""

import multiprocessing
import random

import pytest

from ola_augment.operations import compile_kernels

# Processes of tests are forked from one that has imported these, instead of importing them each.
multiprocessing.set_forkserver_preload(["ola_augment.training", "pytest"])


@pytest.fixture(autouse=True, scope="session")
def _compiled():
    """Batches run on the compiled kernels from the first test on."""
    compile_kernels()


def pytest_addoption(parser):
    parser.addoption("--random-order", type=int, metavar="SEED", help="run tests in random order")


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--random-order")
    if seed is not None:
        random.Random(seed).shuffle(items)
