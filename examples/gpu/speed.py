"""Images per second, and what augmentation and alignments take of the steps of a WRN-28-10."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from engine import CLASSES
from networks import make_network
from rows import Row, check, emit, pictures, seconds

from ola_augment import OLAAugment, OLALearner, UniformAugment

#: Of a training step, and of a pair of steps without learning.
AUGMENTATION, LEARNING = 0.03, 1.20


def throughput(device: str, quick: bool) -> None:
    augment = UniformAugment("wide_long")
    sizes = [(16, 32)] if quick else [(256, 32), (2048, 32), (32, 224), (256, 224)]
    for count, side in sizes:
        images = pictures(count, side).to(device)
        for name, batch in (("uint8", images), ("float32", images / 255)):
            taken = seconds(lambda batch=batch: augment.augment(batch), device, 2 if quick else 10)
            emit(Row("speed", f"augmentation of {count} x {side}x{side}, {name}",
                     f"{count / taken:,.0f} images/s"))  # fmt: skip


class Steps:
    """Training steps of one network on random images, in bfloat16 on a GPU."""

    def __init__(self, device: str, quick: bool) -> None:
        torch.manual_seed(0)
        self.device, self.repeats = device, 2 if quick else 8
        self.name, count = ("wrn-10-1", 8) if quick else ("wrn-28-10", 256)
        self.model = make_network(self.name, CLASSES).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.images = pictures(count, 32).to(device)
        self.labels = torch.arange(count, device=device) % CLASSES

    def backward(self, images: torch.Tensor) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            outputs = self.model(images.float() / 255)
        F.cross_entropy(outputs.float(), self.labels).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def plain(self, augment: UniformAugment | None = None) -> None:
        self.backward(self.images if augment is None else augment.augment(self.images)[0])
        self.update()

    def pair(self, augment: UniformAugment) -> None:
        self.plain(augment)
        self.plain()

    def learning_pair(self, learner: OLALearner) -> None:
        with learner.augmented_step():
            self.backward(learner.augment(self.images))
        self.update()
        with learner.plain_step():
            self.backward(self.images)
        self.update()

    def peak(self, function) -> float:
        """Mebibytes that tensors take at most; 0 where that is not counted."""
        if self.device != "cuda":
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**20


def shares(device: str, quick: bool) -> None:
    steps = Steps(device, quick)
    uniform = UniformAugment("wide_long")
    learner = OLALearner(steps.model, OLAAugment("wide_long"))

    def augmentation() -> tuple[bool, str]:
        plain = seconds(steps.plain, device, steps.repeats)
        augmented = seconds(lambda: steps.plain(uniform), device, steps.repeats)
        share = max(0.0, 1 - plain / augmented)
        return quick or share <= AUGMENTATION, f"{100 * share:.1f} % of {1e3 * augmented:.1f} ms"

    def learning() -> tuple[bool, str]:
        pair = seconds(lambda: steps.pair(uniform), device, steps.repeats)
        learned = seconds(lambda: steps.learning_pair(learner), device, steps.repeats)
        return quick or learned / pair <= LEARNING, f"{learned / pair:.2f} of {1e3 * pair:.1f} ms"

    def memory() -> tuple[bool, str]:
        pair = steps.peak(lambda: steps.pair(uniform))
        learned = steps.peak(lambda: steps.learning_pair(learner))
        if not pair:
            return True, "not counted on the CPU"
        return True, f"{learned / pair:.2f} of {pair:,.0f} MiB"

    name = f"{steps.name}, batch {len(steps.images)}"
    part = "augmentation's share of a step"
    check("speed", f"{part}, {name}", f"<= {AUGMENTATION:.0%}", augmentation)
    check("speed", f"a pair that teaches over one that does not, {name}", f"<= {LEARNING:.2f}",
          learning)  # fmt: skip
    check("speed", f"peak memory of a pair that teaches, {name}", "", memory)


def main(device: str, quick: bool) -> None:
    throughput(device, quick)
    shares(device, quick)
