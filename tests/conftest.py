"""Options of the suite."""

import random


def pytest_addoption(parser):
    parser.addoption("--random-order", type=int, metavar="SEED", help="run tests in random order")


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--random-order")
    if seed is not None:
        random.Random(seed).shuffle(items)
