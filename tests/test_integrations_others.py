"""Frameworks that start processes, copy learners or average weights, as they are."""

import copy
import os

import pytest
import torch
from loops import (
    CLIP,
    learner_of,
    loader,
    logits,
    loss_of,
    network,
    optimizer_of,
    plain_loop,
    rejoining_learner,
)
from ranks import free_port
from torch import nn

from ola_augment import OLAAugment, OLALearner

# The frameworks' own warnings are not ours.
pytestmark = [pytest.mark.filterwarnings(which) for which in ("ignore", "error:::ola_augment")]


def recommended(model):
    held_out = [tuple(batch) for batch in loader(16)]
    return OLALearner.recommended(model, OLAAugment("rand_augment", strength=1.0), held_out, 500)


def written(folder, rank, model, learner):
    torch.save(
        {
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
            "values": learner.updater.state_dict()["moment"],
            "draws": learner.transform.policy.sample(8).ops,
            "pairs": torch.tensor(learner.pairs),
            "skipped": torch.tensor(learner.skipped.total()),
        },
        folder / f"{rank}.pt",
    )


def check_ranks(folder, pairs):
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("weights", "values", "pairs", "skipped"):
        assert torch.equal(first[name], second[name]), name
    assert first["values"].any()
    assert (first["pairs"], first["skipped"]) == (pairs, 0)


def test_lightning_forks_ranks(tmp_path):
    """``ddp_fork``, as in notebooks: model and learner were made before the ranks."""
    case = pytest.importorskip("test_integrations_lightning")

    class Writes(case.lightning.Callback):
        def on_fit_end(self, trainer, pl_module):
            written(tmp_path, trainer.global_rank, pl_module, callback.learner)

    module = case.Module()
    callback = case.OLACallback(recommended(module.network))
    run = case.trainer(callback, Writes(), strategy="ddp_fork", devices=2, gradient_clip_val=None)
    run.fit(module, loader(32))
    check_ranks(tmp_path, pairs=2)


def by_accelerate(folder, learner):
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = learner._model
    batches = accelerator.prepare(loader(32))
    prepared = accelerator.prepare(model)
    own = OLALearner.recommended(prepared, learner.transform, list(loader(16)), 500)
    plain_loop(prepared, own, list(batches))
    written(folder, accelerator.process_index, model, own)


def test_a_notebook_launches_ranks(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of other tests
    learner = recommended(network())
    port = str(free_port())
    accelerate.notebook_launcher(by_accelerate, (tmp_path, learner), num_processes=2, use_port=port)
    check_ranks(tmp_path, pairs=2)
    assert "RANK" not in os.environ


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averaged_weights(kind):
    """They copy the module, with a learner among its attributes."""
    case = pytest.importorskip("test_integrations_lightning")
    options = {"swa_lrs": 0.05, "swa_epoch_start": 1} if kind.startswith("Stochastic") else {}
    average = getattr(case.lightning.callbacks, kind)(**options)
    module = case.Module()
    module.learner = learner_of(module.network)
    run = case.trainer(average, case.OLACallback(module.learner), epochs=3)
    run.fit(module, loader(16), loader(8))
    assert module.learner.pairs == 6
    assert not module.learner.skipped
    assert logits(module.learner).any()


def test_skorch():
    """A net whose ``train_step_single`` is half of a pair, and which is copied."""
    skorch = pytest.importorskip("skorch")

    class Net(skorch.NeuralNetClassifier):
        def initialize(self):
            super().initialize()
            self.learner_ = rejoining_learner(self.module_)
            return self

        def train_step_single(self, batch, **options):
            learner = self.learner_
            images, targets = learner.rejoin(tuple(batch), train_size=48)
            self._second = not getattr(self, "_second", True)
            with learner.plain_step() if self._second else learner.augmented_step():
                seen = images if self._second else learner.augment(images)
                self._set_training(True)
                loss = loss_of(self.module_, seen, targets)
                loss.backward()
            return {"loss": loss.detach(), "y_pred": targets}

    images, targets = loader(48).dataset[:]
    net = Net(
        network(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=0.1, batch_size=4,
        max_epochs=2, train_split=None, verbose=0, iterator_train__shuffle=False,
    )  # fmt: skip
    net.fit(images, targets)
    assert (net.learner_.pairs, net.learner_.skipped.total()) == (12, 0)
    assert logits(net.learner_).any()
    assert copy.deepcopy(net).learner_.pairs == 12


class Accelerated:
    """The loop of accelerate's documentation, with a learner among what it checkpoints."""

    def __init__(self, accumulate=1, **options):
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.own = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = network()
        self.model, self.optimizer = self.own.prepare(model, optimizer_of(model))
        self.learner = learner_of(self.model, **options)
        self.own.register_for_checkpointing(self.learner)

    def train(self, batches):
        for images, targets, *actions in self.own.prepare(batches):
            with self.own.accumulate(self.model):
                options = {"actions": actions[0]} if actions else {}
                last = self.own.sync_gradients
                with self.learner.step(images, last=last, **options) as step:
                    self.own.backward(loss_of(self.model, step.images, targets))
                if last:
                    self.own.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self.learner


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_trains_as_the_plain_loop(accumulate):
    run, model = Accelerated(accumulate), network()
    run.train(loader())
    expected = learner_of(model)
    plain_loop(model, expected, list(loader()), accumulate)
    assert run.learner.pairs == expected.pairs > 2
    torch.testing.assert_close(logits(run.learner), logits(expected))
    assert logits(expected).abs().max() > 0.1
    torch.testing.assert_close(dict(run.model.state_dict()), dict(model.state_dict()))


def test_an_update_that_accelerate_cuts_short_teaches_too():
    """7 batches by twos: the last update has one."""
    learner = Accelerated(accumulate=2).train(loader(28))
    assert (learner.pairs, learner.skipped.total()) == (2, 0)


def test_accelerate_with_workers():
    run = Accelerated()
    learner = run.train(loader(num_workers=1, collate_fn=run.learner.transform.collate))
    assert (learner.pairs, learner.skipped.total()) == (6, 0)
    assert logits(learner).abs().max() > 0.1


@pytest.mark.parametrize(("reference", "steps"), [("next", 4), ("held out", 5)])
def test_accelerate_resumes(tmp_path, reference, steps):
    """With held-out images in the middle of a pair too."""

    def run():
        return Accelerated(reference="next" if reference == "next" else list(loader(8)))

    whole, stopped, resumed = run(), run(), run()
    whole.train(loader())
    stopped.train(list(loader())[:steps])
    stopped.own.save_state(tmp_path)
    resumed.own.load_state(tmp_path)
    resumed.train(list(loader())[steps:])
    assert resumed.learner.pairs == whole.learner.pairs == 6
    assert torch.equal(logits(resumed.learner), logits(whole.learner))
