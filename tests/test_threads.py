"""Threads share one transform."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ola_augment import OLAAugment


def test_every_thread_gets_its_own_draw():
    augment = OLAAugment("wide_long", generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)

    def call(_):
        out, actions = augment.augment(images)
        return torch.equal(out, augment.replay(images, actions)), actions

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(64)))
    assert all(same for same, _ in results)
    draws = {actions.centers.numpy().tobytes() for _, actions in results}
    assert len(draws) == 64
