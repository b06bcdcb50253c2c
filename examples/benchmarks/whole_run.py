"""What a run of OLALearner.recommended costs over one with UniformAugment, from pairs of each kind.

    python examples/benchmarks/whole_run.py --model small_cnn wrn-16-4

Pairs of steps that teach (captured, with the gradient of held-out images), others, of which one
batch is augmented, and what a trial measures are timed in turns with pairs of plain steps and with
pairs of which UniformAugment augments both batches. A run is their sum, as often as the recommended
setting has them in 2,000 pairs on a target domain, with two operations an image, its most, in the
other pairs. One thread, processor time, medians. Exits with 1 if a run takes more than LIMITS times
UniformAugment's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from networks import make_network
from timing import medians
from torch import Tensor, nn

from ola_augment import OLAAugment, OLALearner, UniformAugment
from ola_augment.training.mean_weights import MeanWeights

#: Of a run with UniformAugment, by network.
LIMITS = {"small_cnn": 1.10, "wrn-16-4": 1.05}
PAIRS = 2000


class Bench:
    """Pairs of steps of one network, by what is done to their images."""

    def __init__(self, name: str, batch: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
        self.targets = torch.randint(0, 10, (batch,))
        self.held_out = [(self.images, self.targets)]

    def trained(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_network(self.name, 10).train()
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def loss(self, model: nn.Module, images: Tensor, _: Tensor | None = None) -> Tensor:
        return F.cross_entropy(model(images.float() / 255), self.targets)

    def fixed(self, augment: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """A pair of steps on images that are always augmented alike."""
        model, sgd = self.trained()

        def pair() -> None:
            for _ in range(2):
                sgd.zero_grad()
                self.loss(model, augment(self.images)).backward()
                sgd.step()

        return pair

    def learning(self, make: Callable[[nn.Module], OLALearner]) -> Callable[[], None]:
        """A pair of a learner."""
        model, sgd = self.trained()
        learner = make(model)

        def pair() -> None:
            for _ in range(2):
                sgd.zero_grad()
                with learner.step(self.images) as step:
                    self.loss(model, step.images).backward()
                sgd.step()

        return pair

    def recommended(self, model: nn.Module) -> OLALearner:
        return OLALearner.recommended(
            model,
            OLAAugment(strength=1),
            self.held_out,
            PAIRS,
            self.loss,
        )

    def teaching(self, model: nn.Module) -> OLALearner:
        learner = self.recommended(model)
        learner.learn_every = 1
        return learner

    def other(self, model: nn.Module) -> OLALearner:
        """Whose first pair alone teaches."""
        return OLALearner(
            model,
            OLAAugment(strength=2),
            reference=self.held_out,
            learn_pairs=1,
            loss=self.loss,
        )

    def measured(self) -> Callable[[], object]:
        """A held-out loss."""
        model, _ = self.trained()
        return torch.no_grad()(lambda: self.loss(model, self.images))

    def averaged(self) -> Callable[[], object]:
        """A step's weights into their mean."""
        model, _ = self.trained()
        weights = MeanWeights()
        return lambda: weights.take(model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(LIMITS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    slow = False
    print(
        "| network | none | UniformAugment | teaching | other | run / UniformAugment | run / none |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.model:
        bench = Bench(name, options.batch)
        kinds = {
            "none": bench.fixed(lambda images: images),
            "uniform": bench.fixed(UniformAugment()),
            "teaching": bench.learning(bench.teaching),
            "other": bench.learning(bench.other),
            "measured": bench.measured(),
            "averaged": bench.averaged(),
        }
        seconds = medians(kinds, options.turns)
        learner = bench.recommended(bench.trained()[0])
        assert learner.trial is not None
        assert learner.learn_pairs is not None
        teach = -(-learner.learn_pairs // learner.learn_every)
        windows, length = learner.trial.windows, learner.trial.length
        run = teach * seconds["teaching"] + (PAIRS - teach) * seconds["other"]
        run += windows * (seconds["measured"] + length / 2 * seconds["averaged"])
        ratios = [run / (PAIRS * seconds[kind]) for kind in ("uniform", "none")]
        slow |= ratios[0] > LIMITS.get(name, ratios[0])
        shown = [f"{1e3 * seconds[kind]:.1f} ms" for kind in list(kinds)[:4]]
        print(
            "|", " | ".join([name, *shown, *(f"{ratio:.2f}" for ratio in ratios)]), "|", flush=True
        )
    return int(slow)


if __name__ == "__main__":
    raise SystemExit(main())
