"""OLACallback: Lightning's own loop learns the policy that the plain loop learns."""

import copy

import pytest
import torch
from loops import CLIP, learner_of, loader, logits, loss_of, network, optimizer_of, plain_loop
from torch import nn
from torch.utils.data import DataLoader

from ola_augment import OLALearner

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
    assert callback.learner.skipped == 0
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


def test_an_update_that_the_epoch_cuts_short_costs_a_reward():
    module = Module()
    callback = OLACallback(learner_of(module.network))
    trainer(callback, accumulate=2, epochs=2).fit(module, loader(28))  # 7 batches an epoch
    assert callback.learner.pairs == 2  # the other two never had a whole second half
    assert logits(callback.learner).any()


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
    assert learner.pairs + learner.skipped >= 6
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
