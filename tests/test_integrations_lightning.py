"""OLACallback: Lightning's own loop learns the policy that the plain loop learns."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from loops import (
    CLIP,
    check_joined,
    dataset,
    learner_of,
    loader,
    logits,
    loss_of,
    network,
    optimizer_of,
    plain_loop,
    rejoining_learner,
    two_classes,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ola_augment import NSLRUpdater, OLAAugment, OLALearner
from ola_augment.alignment import DirectionalAlignment
from ola_augment.training import Thermostat, Trial

lightning = pytest.importorskip("lightning.pytorch")
from ola_augment.integrations.lightning import OLACallback  # noqa: E402

# The framework's own warnings are not ours.
pytestmark = [pytest.mark.filterwarnings(which) for which in ("ignore", "error:::ola_augment")]


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, targets = batch
        self.seen.append(images)
        return loss_of(self.network, images, targets)

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        self.log("loss", loss_of(self.network, images, targets))

    def configure_optimizers(self):
        return optimizer_of(self)


def trainer(*callbacks, accumulate=1, epochs=1, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"enable_checkpointing": False, "gradient_clip_val": CLIP, **quiet, **options}
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=accumulate,
        callbacks=list(callbacks), **options,
    )  # fmt: skip


def as_they_are(batches):
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


@pytest.mark.parametrize(
    ("reference", "accumulate"),
    [("next", 1), ("next", 2), ("held out", 2), ("current", 2), ("current", 4)],
)
def test_the_same_as_the_plain_loop(reference, accumulate):
    def learner(model):
        held_out = list(loader(8))
        return learner_of(model, reference=held_out if reference == "held out" else reference)

    module, model = Module(), network()
    callback, expected = OLACallback(learner(module.network)), learner(model)
    trainer(callback, accumulate=accumulate, epochs=2).fit(module, loader(), loader(8))
    plain_loop(model, expected, list(loader()), accumulate, epochs=2)
    assert callback.learner.pairs == expected.pairs > 2
    assert callback.learner.skipped.total() == 0
    assert callback.stats.stepped
    torch.testing.assert_close(logits(callback.learner), logits(expected))
    assert logits(expected).abs().max() > 0.1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(module.network.state_dict()[name], value)


def test_every_second_update_is_plain_and_batches_stay_whole():
    module = Module()
    batches = list(loader(32))
    before = copy.deepcopy(batches)
    trainer(OLACallback(learner_of(module.network))).fit(module, as_they_are(batches))
    same = [
        torch.equal(seen, images) for seen, (images, _) in zip(module.seen, before, strict=True)
    ]
    assert same == [False, True] * 4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, before, strict=True))
    assert "training_step" not in vars(module)


def scaled():
    """float16 with a scaler, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)}


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, scaled()], ids=["bf16", "fp16"])
def test_mixed_precision(options):
    module, model = Module(), network()
    callback, expected = OLACallback(learner_of(module.network)), learner_of(model)
    trainer(callback, **options).fit(module, loader())
    plain_loop(model, expected, list(loader()))
    assert callback.learner.pairs == expected.pairs
    assert torch.corrcoef(torch.stack([logits(callback.learner), logits(expected)]))[0, 1] > 0.8


class Floats(Module):
    def training_step(self, batch, batch_idx):
        images, targets = batch
        assert images.dtype == self.network[0].weight.dtype
        return F.cross_entropy(self.network(images), targets)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_models_in_another_precision_than_the_held_out_images(precision):
    images, targets = dataset()[:]
    images = images / 255

    def learned(precision):
        module = Floats()
        held_out = [(images[:16], targets[:16])]
        learner = learner_of(module.network, reference=held_out, rejoin=True)
        callback, batches = OLACallback(learner), TensorDataset(images[16:], targets[16:])
        # Clipping has no kernel for 16 bits on the CPU.
        options = {"precision": precision, "gradient_clip_val": None}
        trainer(callback, **options).fit(module, DataLoader(batches, batch_size=4))
        assert not callback.learner.skipped
        return logits(callback.learner)

    found = learned(precision)
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found, learned("32-true")]))[0, 1] > 0.8


@pytest.mark.parametrize("accumulate", [2, 4, 6])
def test_an_update_that_the_epoch_cuts_short_teaches_too(accumulate):
    """7 batches an epoch, the loader with and without a length; and both halves in one update."""
    batches = list(loader(28))

    class Unsized(IterableDataset):
        def __iter__(self):
            return iter(batches)

    for given in (loader(28), as_they_are(Unsized())):
        module = Module()
        callback = OLACallback(learner_of(module.network))
        trainer(callback, accumulate=accumulate, epochs=2).fit(module, given)
        updates = 2 * -(-7 // accumulate)
        assert callback.learner.pairs == updates // 2
        assert not callback.learner.skipped
        assert logits(callback.learner).any()
    module = Module()
    callback = OLACallback(learner_of(module.network, reference="current"))
    trainer(callback, accumulate=accumulate, epochs=2).fit(module, loader(28))
    # An update of one batch has no halves.
    assert callback.learner.pairs == 2 * (7 // accumulate + (7 % accumulate > 1))
    assert not callback.learner.skipped


class Sharpness(torch.optim.SGD):
    """SAM: the loss is asked for at theta, and again where it is worst nearby."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        moves = [0.01 * p.grad / (p.grad.norm() + 1e-12) for p in held]
        for parameter, move in zip(held, moves, strict=True):
            parameter.add_(move)
        with torch.enable_grad():
            closure()
        for parameter, move in zip(held, moves, strict=True):
            parameter.sub_(move)
        super().step()
        return loss


@pytest.mark.parametrize("kind", ["SAM", "LBFGS"])
def test_an_optimizer_that_asks_for_the_loss_several_times(kind):
    class Several(Module):
        def configure_optimizers(self):
            if kind == "SAM":
                return Sharpness(self.parameters(), lr=0.1)
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    module = Several()
    callback = OLACallback(learner_of(module.network))
    batches = list(loader())
    trainer(callback, gradient_clip_val=None).fit(module, as_they_are(batches))
    assert callback.learner.pairs == 6
    assert not callback.learner.skipped
    assert logits(callback.learner).any()
    for index, (images, _) in enumerate(batches):
        calls = len(module.seen) // len(batches)
        for seen in module.seen[index * calls : (index + 1) * calls]:
            assert torch.equal(seen, images) == (index % 2 == 1)
            assert torch.equal(seen, module.seen[index * calls])


def test_training_step_gets_what_it_is_called_with():
    class Busy(Module):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.training_step(batch, batch_idx))

        def on_train_batch_start(self, batch, batch_idx):
            batch[0].fill_(200)

    module = Busy()
    learner = learner_of(module.network)
    search = lightning.callbacks.LearningRateFinder(num_training_steps=4, update_attr=False)
    search.on_fit_start = lambda *given: None

    class Later(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                search.lr_find(trainer, pl_module)

    module.lr = 0.1
    trainer(OLACallback(learner), Later(), epochs=2).fit(module, loader(16), loader(8))
    assert learner.pairs == 4
    plain = [seen for seen in module.seen if (seen == 200).all()]
    assert len(plain) >= 4


def test_the_recommended_learner():
    module = Module()
    augment = OLAAugment("rand_augment", strength=1.0)
    learner = OLALearner.recommended(module.network, augment, list(loader(8)), pairs=500)
    with pytest.warns(UserWarning, match="12 pairs of steps, .* lasts until pair 308"):
        trainer(OLACallback(learner), epochs=2).fit(module, loader())
    assert learner.pairs == 12
    assert not learner.skipped
    assert learner.updater.state_dict()["moment"].any()


def test_a_second_fit_counts_the_pairs_of_the_first(tmp_path, monkeypatch):
    """In another trainer, and from a checkpoint, which has them."""
    monkeypatch.setattr(Trial, "begin_pair", lambda self, *arguments: None)  # it is not over
    module = Module()
    augment = OLAAugment("rand_augment", strength=1.0)
    learner = OLALearner.recommended(module.network, augment, list(loader(8)), pairs=500)
    learner.pairs = 290

    def fit(epochs, **options):
        run = trainer(OLACallback(learner), epochs=epochs)
        run.fit(module, loader(), **options)
        return run

    with pytest.warns(UserWarning, match="296 pairs of steps, .* until pair 308"):
        first = fit(1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this run has")
        fit(2)
    assert learner.pairs == 308
    with pytest.warns(UserWarning, match="302 pairs of steps, .* until pair 308"):
        fit(2, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert learner.pairs == 302


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset())


@pytest.mark.filterwarnings("error:this run")
@pytest.mark.parametrize("kind", ["without an end", "without a length", "ever more batches"])
def test_where_nobody_knows_how_long_a_run_is_nobody_is_warned(kind):
    module = Module()
    augment = OLAAugment("rand_augment", strength=1.0)
    learner = OLALearner.recommended(module.network, augment, list(loader(8)), pairs=500)
    callbacks, data, options = [OLACallback(learner)], loader(), {}
    if kind == "without an end":
        options = {"epochs": -1, "max_time": {"seconds": 0}}
    elif kind == "without a length":
        data = DataLoader(Stream(), batch_size=4)
    else:
        callbacks.append(lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 2}))
    trainer(*callbacks, **options).fit(module, data)


class Labelled(Module):
    def __init__(self):
        super().__init__()
        self.labels = []

    def training_step(self, batch, batch_idx):
        self.labels.append(batch[1])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["sized", "batches", "workers", "stream"])
def test_held_out_images_join_the_training(kind):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(two_classes())

    module = Labelled()
    learner = rejoining_learner(module.network)
    augment = learner.transform
    options = {"collate_fn": augment.collate} if kind == "workers" else {}
    data = Stream() if kind == "stream" else two_classes()
    batches = DataLoader(data, batch_size=4, **options)
    given = as_they_are(list(batches)) if kind == "batches" else batches
    trainer(OLACallback(learner), epochs=2).fit(module, given)
    assert (learner.pairs, learner.skipped.total()) == (12, 0)
    if kind != "stream":
        check_joined(module.labels)
        return
    joined = [int((part == 2).sum()) for part in module.labels]
    assert sum(joined[12:]) == 12  # by then it is known how many there are: a quarter of 48
    assert sum(joined[:4]) == 0
    assert sum(joined[4:12]) > 8  # a larger share of those that came so far


def test_held_out_images_that_cannot_join_are_refused():
    module = Module()
    held_out = [(x.float() / 255, y) for x, y in loader(8)]
    augment = OLAAugment("rand_augment", strength=1.0)
    given = OLALearner.recommended(module.network, augment, held_out, pairs=500)
    with pytest.raises(ValueError, match="must look like those of the training"):
        trainer(OLACallback(given)).fit(module, loader(8))
    given = OLALearner.recommended(module.network, augment, held_out, pairs=500, rejoin=False)
    trainer(OLACallback(given)).fit(module, loader(8))
    assert given.pairs == 1


def test_an_accuracy_of_ones_own_and_none_at_all():
    class Pair(nn.Sequential):
        def forward(self, images):
            return {"scores": super().forward(images)}

    class Named(Module):
        def __init__(self):
            super().__init__()
            self.network = Pair(*network())

        def training_step(self, batch, batch_idx):
            outputs = self.network(batch[0].float() / 255)
            return nn.functional.cross_entropy(outputs["scores"], batch[1])

    def fit(**options):
        module = Named()
        augment = OLAAugment("rand_augment", strength=1.0)
        learner = OLALearner(module.network, augment, thermostat=Thermostat(augment.policy))
        trainer(OLACallback(learner, **options)).fit(module, loader(16))
        return learner

    def accuracy(outputs, batch):
        return float((outputs["scores"].argmax(1) == batch[1]).float().mean())

    assert fit(accuracy=accuracy).thermostat.calls == 2
    with pytest.raises(ValueError, match="give accuracy=, a function of both"):
        fit()


def test_learners_that_need_more_than_a_batch_are_refused():
    model = network()
    augment = OLAAugment("rand_augment")
    losses = DirectionalAlignment(model, lambda model, images: model(images).sum(1))
    for options, part in (
        ({"updater": NSLRUpdater(augment.policy)}, "NSLRUpdater"),
        ({"engine": losses}, "DirectionalAlignment"),
    ):
        with pytest.raises(ValueError, match=part):
            OLACallback(OLALearner(model, augment, **options))


def test_actions_that_were_rebuilt_as_a_tuple(monkeypatch):
    module = Module()
    learner = learner_of(module.network)
    collated = [(x, y, tuple(a)) for x, y, a in loader(16, collate_fn=learner.transform.collate)]
    trainer(OLACallback(learner)).fit(module, as_they_are(collated))
    for seen, (images, _, _) in zip(module.seen, collated, strict=True):
        assert torch.equal(seen, images)
    assert learner.pairs == 2


def test_stopped_and_resumed(tmp_path):
    """Three updates an epoch: the checkpoints fall into the middle of a pair too."""

    def fit(callback, epochs, **options):
        module = callback.module
        checkpoints = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
        trainer(
            callback, checkpoints, epochs=epochs, enable_checkpointing=True
        ).fit(module, loader(12), **options)  # fmt: skip
        return logits(callback.learner)

    def make():
        module = Module()
        callback = OLACallback(learner_of(module.network))
        callback.module = module
        return callback

    whole = fit(make(), 4)
    (tmp_path / "last.ckpt").unlink()
    fit(make(), 3)
    resumed = make()
    found = fit(resumed, 4, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(found, whole)
    assert resumed.learner.pairs == 6


def test_workers_augment():
    module = Module()
    learner = learner_of(module.network)
    augment = learner.transform
    batches = loader(collate_fn=augment.collate, num_workers=1)
    trainer(OLACallback(learner)).fit(module, batches)
    assert learner.pairs == 6
    assert logits(learner).any()


def test_dictionaries():
    class Named(Module):
        def training_step(self, batch, batch_idx):
            assert "actions" not in batch
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    batches = [{"image": images, "label": labels} for images, labels in loader()]
    module, model = Named(), network()
    callback, expected = OLACallback(learner_of(module.network)), learner_of(model)
    trainer(callback).fit(module, as_they_are(batches))
    plain_loop(model, expected, list(loader()))
    torch.testing.assert_close(logits(callback.learner), logits(expected))


def test_steps_that_are_skipped_or_fail_leave_no_trace():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (2, 5) else loss

    module = Skips()
    learner = learner_of(module.network)
    trainer(OLACallback(learner)).fit(module, loader())
    assert learner.pairs + learner.skipped.total() >= 6
    assert logits(learner).any()

    class Fails(Module):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise FloatingPointError("no")

    module = Fails()
    learner = learner_of(module.network)
    with pytest.raises(FloatingPointError):
        trainer(OLACallback(learner)).fit(module, loader())
    assert "training_step" not in vars(module)
    assert not logits(learner).any()
    plain_loop(module.network, learner, list(loader(8)))  # nothing is open


def test_refusals():
    class Manual(Module):
        automatic_optimization = False

    with pytest.raises(TypeError, match="OLALearner"):
        OLACallback(network())
    manual = Manual()
    manual.automatic_optimization = False
    for module, learner, message in (
        (manual, learner_of(manual.network), "automatic optimization"),
        (Module(), learner_of(network()), "network inside Module"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(OLACallback(learner), gradient_clip_val=None).fit(module, loader())
    module = Module()
    sharded = trainer(OLACallback(learner_of(module.network)))
    sharded.strategy.__class__ = type("FSDPStrategy", (type(sharded.strategy),), {})
    with pytest.raises(ValueError, match="FSDPStrategy shards"):
        sharded.fit(module, loader())
    module = Module()
    with pytest.raises(ValueError, match="images"):
        trainer(OLACallback(learner_of(module.network))).fit(
            module, as_they_are([{"pixels": torch.zeros(2)}])
        )
    module = Module()
    with pytest.raises(ValueError, match="even number of batches, got 1"):
        trainer(OLACallback(learner_of(module.network, reference="current"))).fit(module, loader())


def test_a_learner_of_the_whole_module():
    """Its forward is what training_step calls."""

    class Whole(Module):
        def forward(self, images):
            return self.network(images)

        def training_step(self, batch, batch_idx):
            return loss_of(self, *batch)

    module, model = Whole(), network()
    callback, expected = OLACallback(learner_of(module)), learner_of(model)
    trainer(callback).fit(module, loader())
    plain_loop(model, expected, list(loader()))
    torch.testing.assert_close(logits(callback.learner), logits(expected))


def test_a_compiled_network():
    module = Module()
    module.network = torch.compile(module.network, backend="eager")
    learner = OLALearner(module.network, learner_of(network()).transform)
    trainer(OLACallback(learner)).fit(module, loader(16))
    assert learner.pairs == 2
    assert isinstance(module.network, nn.Module)
