"""What a capture costs, counted in calls: times are for the benchmark."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ola_augment.alignment import GradientAlignment
from ola_augment.alignment._torch import unwatched, without
from ola_augment.alignment.method.recorder import Recorder


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)
    )


def backward(model, images, targets):
    F.cross_entropy(model(images), targets).backward()


def test_a_mode_steps_aside_where_it_is_the_innermost():
    inner, outer, x = Counting(), Counting(), torch.ones(2)
    with outer:
        with inner, without(inner):
            torch.add(x, x)
        assert (inner.calls, outer.calls) == (0, 1)
        with inner, without(outer):
            torch.add(x, x)
        assert (inner.calls, outer.calls) == (1, 2)
        with inner:
            torch.add(x, x)
        assert (inner.calls, outer.calls) == (2, 3)


def test_shapes_are_read_past_every_mode():
    mode, x = Counting(), torch.ones(2)
    with mode, unwatched():
        assert x.shape == (2,)
    assert mode.calls == 0


def test_verifying_passes_are_not_watched_twice(monkeypatch):
    calls = []
    original = Recorder.__torch_function__

    def counted(self, func, types, args=(), kwargs=None):
        calls.append(func)
        return original(self, func, types, args, kwargs)

    monkeypatch.setattr(Recorder, "__torch_function__", counted)
    torch.manual_seed(0)
    model = small_network()
    engine = GradientAlignment(model)
    counts = []
    for _ in range(3):
        calls.clear()
        with engine.capture():
            backward(model, torch.randn(8, 3, 8, 8), torch.arange(8) % 5)
        model.zero_grad()
        counts.append(len(calls))
    assert counts[0] == counts[1] == counts[2]
    # The layers' calls, loss and backward; nothing for shapes and settings.
    assert counts[0] < 12


def test_what_was_received_outlives_changes_of_the_gradients_in_place():
    torch.manual_seed(0)
    model = small_network().double()
    images, targets = torch.randn(8, 3, 8, 8).double(), torch.arange(8) % 5
    engine = GradientAlignment(model)
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with engine.capture():
        backward(model, images, targets)
    expected = engine.align(g)
    for set_to_none in (True, False):
        model.zero_grad(set_to_none=set_to_none)
        with engine.capture() as captured:
            backward(model, images, targets)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        torch.testing.assert_close(captured.align(g), expected)
