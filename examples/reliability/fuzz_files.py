"""Damage policy files in random ways: each is read, or refused by a ValueError that names it.

python examples/reliability/fuzz_files.py --mutations 200000
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from ola_augment import (
    OLAPolicy,
    RandAugmentPolicy,
    SplitPolicy,
    UniformPolicy,
    load_policy,
    save_policy,
)

NAN, INF = float("nan"), float("inf")
VALUES = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, -(10**30), 0.5, 1e308, NAN, INF,
    "", "invert", "wide_long", "OLAPolicy", "SplitPolicy", "\ud800", [], {}, [[]], [None],
    {"x": 1}, [1e999], "0" * 1000,
]  # fmt: skip
SIGNS = b'{}[]",:0123456789eE-.\\'


def places(content, path=()):
    """Every entry of a JSON document."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def mutate(data: bytes, content, known, chance: random.Random) -> bytes:
    """One to three changes, of the bytes or of the document."""
    if chance.random() < 0.5:
        found = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(found))
            kind = chance.randrange(4)
            if kind == 0:
                found[at] = chance.randrange(256)
            elif kind == 1:
                del found[at : at + chance.choice((1, 1, 8, 400))]
            elif kind == 2:
                found[at:at] = bytes(
                    chance.choices(b'{}[]",:0123456789eE-.\\', k=chance.randint(1, 8))
                )
            else:
                found[at:at] = found[at : at + chance.randint(1, 200)]
            if not found:
                break
        return bytes(found)
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(known)
        owner = content
        try:
            for key in path[:-1]:
                owner = owner[key]
            if chance.random() < 0.2:
                del owner[path[-1]]
            else:
                owner[path[-1]] = copy.deepcopy(chance.choice(VALUES))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    return json.dumps(content).encode("utf-8", "surrogatepass")


def policies():
    return [
        OLAPolicy("rand_augment", 2, 3),
        UniformPolicy("wide_long", 2, 0.5, 5),
        RandAugmentPolicy("rand_augment", 3, 2),
        SplitPolicy(4),
    ]


def fuzz(mutations: int, seed: int = 0) -> tuple[int, int]:
    """Numbers of files that were read and refused; anything else that is raised is a finding."""
    chance = random.Random(seed)
    read = refused = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.json"
        seeds = []
        for policy in policies():
            save_policy(policy, path)
            data = path.read_bytes()
            content = json.loads(data)
            seeds.append((data, content, list(places(content))))
        for number in range(mutations):
            damaged = mutate(*chance.choice(seeds), chance)
            path.write_bytes(damaged)
            try:
                policy = load_policy(path)
            except ValueError as error:
                if str(path) not in str(error):
                    raise AssertionError(f"mutation {number}: no file name in {error}") from error
                refused += 1
            except Exception as error:
                raise AssertionError(f"mutation {number}: {error!r} from {damaged!r}") from error
            else:
                read += 1
                if hasattr(policy, "space"):
                    policy.sample(1)
                assert all(value.isfinite().all() for value in policy.state_dict().values())
    return read, refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # What asks for much memory fails here.
    limit = 12 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    read, refused = fuzz(options.mutations, options.seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.mutations} mutations: {read} read, {refused} refused, peak {peak:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
