"""OLATrainer: transformers' own loop learns the policy that the plain loop learns."""

import shutil
import warnings

import pytest
import torch
from loops import (
    CLIP,
    LR,
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
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import default_collate

from ola_augment import OLAAugment, OLALearner
from ola_augment.training import Trial

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from ola_augment.integrations.huggingface import STATE_NAME, OLATrainer  # noqa: E402

# The framework's own warnings are not ours.
pytestmark = [pytest.mark.filterwarnings(which) for which in ("ignore", "error:::ola_augment")]


class Model(nn.Module):
    """Called as the models of transformers are."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, pixel_values, labels=None):
        outputs = self.network(pixel_values)
        if labels is None:
            return {"logits": outputs}
        return {"loss": nn.functional.cross_entropy(outputs, labels), "logits": outputs}


def rows(size=48):
    return [{"pixel_values": image, "labels": label} for image, label in dataset(size)]


OWN = (
    "data_collator", "preprocess", "eval_dataset", "model_init", "accuracy", "eval_collator",
    "compute_metrics",
)  # fmt: skip


def trainer(folder, accumulate=1, epochs=1, size=48, learner=None, model=None, lr=LR, **options):
    model = model or Model()
    own = {name: options.pop(name) for name in OWN if name in options}
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        report_to="none", dataloader_pin_memory=False, remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **{"save_strategy": "no", "max_grad_norm": CLIP, **options},
    )  # fmt: skip
    optimizer = optimizer_of(model, lr)
    return OLATrainer(
        model=model, args=arguments, train_dataset=rows(size),
        learner=learner or learner_of(model),
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)), **own,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "accumulate"),
    [("next", 1), ("next", 2), ("held out", 2), ("current", 2), ("current", 4)],
)
def test_the_same_as_the_plain_loop(tmp_path, reference, accumulate):
    def held_out_loss(model, images, targets):
        return loss_of(getattr(model, "network", model), images, targets)

    def learner(model):
        held_out = list(loader(8))
        given = held_out if reference == "held out" else reference
        return learner_of(model, reference=given, loss=held_out_loss)

    found, model = Model(), network()
    run = trainer(
        tmp_path, accumulate, epochs=2, model=found, learner=learner(found), eval_dataset=rows(8)
    )
    run.train()
    expected = learner(model)
    plain_loop(model, expected, list(loader()), accumulate, epochs=2)
    assert run.learner.pairs == expected.pairs > 2
    torch.testing.assert_close(logits(run.learner), logits(expected))
    assert logits(expected).abs().max() > 0.1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.network.state_dict()[name], value)
    assert run.evaluate()["eval_loss"] > 0
    assert run.predict(rows(8)).predictions.shape == (8, 3)


def test_the_epochs_last_update_may_be_smaller(tmp_path):
    """7 batches by twos: the last update announces that it is one batch."""
    run = trainer(tmp_path, accumulate=2, size=28)
    run.train()
    assert (run.learner.pairs, run.learner.skipped.total()) == (2, 0)
    model = Model()
    learner = learner_of(model, reference="current")
    trainer(tmp_path, accumulate=2, size=28, model=model, learner=learner).train()
    assert (learner.pairs, learner.skipped.total()) == (3, 0)


def test_mixed_precision(tmp_path):
    run = trainer(tmp_path, bf16=True)
    run.train()
    model = network()
    plain_loop(model, expected := learner_of(model), list(loader()))
    assert run.learner.pairs == expected.pairs
    assert torch.corrcoef(torch.stack([logits(run.learner), logits(expected)]))[0, 1] > 0.8


def test_a_scaler_does_not_reach_the_rewards(tmp_path):
    plain = trainer(tmp_path, max_grad_norm=0, lr=0.01)
    scaled = trainer(tmp_path, max_grad_norm=0, lr=0.01)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for run in (plain, scaled):
        run.train()
    assert scaled.pairs.stats.reward_std == pytest.approx(plain.pairs.stats.reward_std, rel=1e-4)
    torch.testing.assert_close(logits(scaled.learner), logits(plain.learner))


def test_stopped_and_resumed(tmp_path):
    """Three updates an epoch: the checkpoints fall into the middle of a pair too."""
    whole = trainer(tmp_path / "whole", epochs=4, size=12, save_strategy="epoch")
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-9" / STATE_NAME).is_file()
    resumed = trainer(tmp_path / "whole", epochs=4, size=12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    assert torch.equal(logits(resumed.learner), logits(whole.learner))
    assert resumed.learner.pairs == whole.learner.pairs
    latest = trainer(tmp_path / "whole", epochs=5, size=12)
    latest.train(resume_from_checkpoint=True)
    assert not torch.equal(logits(latest.learner), logits(whole.learner))
    (tmp_path / "whole" / "checkpoint-9" / STATE_NAME).unlink()
    with pytest.raises(ValueError, match=STATE_NAME):
        latest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))


def test_the_collator_augments(tmp_path):
    model = Model()
    learner = learner_of(model)

    def collate(samples):
        batch = default_collate(samples)
        batch["pixel_values"], batch["actions"] = learner.transform.augment(batch["pixel_values"])
        return batch

    trainer(tmp_path, model=model, learner=learner, data_collator=collate).train()
    assert learner.pairs == 6
    assert logits(learner).any()


def test_preprocess_is_for_all_batches(tmp_path):
    seen = []

    def preprocess(images):
        seen.append(images.dtype)
        return (images.float() - 128) / 64

    run = trainer(tmp_path, size=8, preprocess=preprocess, eval_dataset=rows(4))
    run.train()
    run.evaluate()
    assert seen == [torch.uint8] * 3


def test_refusals(tmp_path):
    model = Model()
    with pytest.raises(TypeError, match="OLALearner"):
        trainer(tmp_path, model=model, learner=network())
    with pytest.raises(ValueError, match="model that is trained"):
        trainer(tmp_path, model=model, learner=learner_of(network()))
    with pytest.raises(ValueError, match="even number of batches, got 1"):
        trainer(tmp_path, model=model, learner=learner_of(model, reference="current")).train()
    run = trainer(tmp_path, model=model)
    run.train_dataset = [{"inputs": torch.zeros(2), "labels": 0}]
    with pytest.raises(ValueError, match="one of images, image, pixel_values"):
        run.train()


def test_a_model_of_transformers(tmp_path):
    """Its loss inside the forward pass, and a compiled one."""
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    run = trainer(tmp_path, model=transformers.ViTForImageClassification(config), accumulate=2)
    run.train()
    assert run.learner.pairs == 3
    assert logits(run.learner).any()


def test_evaluation_and_prediction_are_on_plain_images(tmp_path):
    """The collator augments in training alone."""

    class Seeing(Model):
        def forward(self, pixel_values, labels=None):
            if not self.training:
                self.seen = pixel_values
            return super().forward(pixel_values, labels)

    model = Seeing()
    learner = learner_of(model)
    augment = learner.transform
    expected = torch.stack([row["pixel_values"] for row in rows(4)]).float() / 255

    def wrapped(samples):
        return augment.collate(samples)

    for collators in (
        {"data_collator": augment.collate},
        {"data_collator": wrapped, "eval_collator": default_collate},
    ):
        run = trainer(
            tmp_path, size=8, model=model, learner=learner, eval_dataset=rows(4), **collators
        )
        run.train()
        assert run.evaluate()["eval_loss"] > 0
        assert torch.equal(model.seen, expected)
        run.predict(rows(4))
        assert torch.equal(model.seen, expected)
    run = trainer(
        tmp_path, model=model, learner=learner, eval_dataset=rows(4), data_collator=wrapped
    )
    with pytest.raises(ValueError, match="give eval_collator="):
        run.evaluate()


def small_vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def test_a_checkpoint_of_a_vit_comes_back_whole(tmp_path):
    """Its tensors are saved under other names than they have."""

    def make(**options):
        model = small_vit()
        return trainer(
            tmp_path, size=16, model=model, learner=learner_of(model), save_strategy="epoch",
            **options,
        )  # fmt: skip

    def weights(run):
        return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    whole = make(epochs=3)
    whole.train()
    resumed = make(epochs=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert torch.equal(logits(resumed.learner), logits(whole.learner))

    best = make(
        epochs=2, eval_dataset=rows(4), eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="worst", lr=0.5,
        compute_metrics=lambda found: {"worst": -float(best.state.epoch)},
    )  # fmt: skip
    torch.manual_seed(1)
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-4")
    saved = transformers.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    for name, value in saved.state_dict().items():
        assert torch.equal(best.model.state_dict()[name], value), name


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    for make in (Model, small_vit):
        model = make()
        run = trainer(tmp_path, size=8, model=model, save_strategy="epoch")
        run.train()
        path = tmp_path / "checkpoint-2" / "model.safetensors"
        tensors = load_file(path)
        lost = next(name for name in tensors if name.endswith("bias"))
        save_file({name: t for name, t in tensors.items() if name != lost}, path, {"format": "pt"})
        resumed = trainer(tmp_path, size=8, model=make())
        with pytest.raises(ValueError, match="lacks 1 tensors"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_recommended_learner(tmp_path):
    model = small_vit()
    augment = OLAAugment("rand_augment", strength=1.0)
    held_out = [default_collate(rows(4))]
    learner = OLALearner.recommended(model, augment, held_out, pairs=500)
    with pytest.warns(UserWarning, match="6 pairs of steps, .* lasts until pair 308"):
        trainer(tmp_path, model=model, learner=learner).train()
    assert learner.pairs == 6
    assert not learner.skipped
    assert learner.updater.state_dict()["moment"].any()


def test_a_second_training_counts_the_pairs_of_the_first(tmp_path, monkeypatch):
    """With another trainer, and from a checkpoint, which has them."""
    monkeypatch.setattr(Trial, "begin_pair", lambda self, *arguments: None)  # it is not over
    model = Model()

    def loss(model, batch):
        return loss_of(model.network, batch["pixel_values"], batch["labels"])

    augment = OLAAugment("rand_augment", strength=1.0)
    held_out = [default_collate(rows(4))]
    learner = OLALearner.recommended(model, augment, held_out, pairs=500, loss=loss)
    learner.pairs = 290

    def train(epochs, **options):
        run = trainer(tmp_path, epochs=epochs, model=model, learner=learner, save_strategy="epoch")
        run.train(**options)

    short = {"expected_warning": UserWarning, "match": "302 pairs of steps, .* until pair 308"}
    with pytest.warns(**short):
        train(2)
    shutil.copytree(tmp_path / "checkpoint-24", tmp_path / "kept")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this run has")
        train(1)
    assert learner.pairs == 308
    with pytest.warns(**short):
        train(2, resume_from_checkpoint=str(tmp_path / "kept"))
    assert learner.pairs == 302


@pytest.mark.parametrize("kind", ["sized", "workers"])
def test_held_out_images_join_the_training(tmp_path, kind):
    """The Trainer's own collator puts the labels first."""

    class Seeing(Model):
        def forward(self, pixel_values, labels=None):
            self.labels.append(labels)
            return super().forward(pixel_values, labels)

    model = Seeing()
    model.labels = []

    def loss(model, batch):
        return loss_of(model.network, batch["image"], batch["label"])

    learner = rejoining_learner(model, loss)
    options = {"data_collator": learner.transform.collate} if kind == "workers" else {}
    run = trainer(
        tmp_path, epochs=2, model=model, learner=learner, save_strategy="epoch", **options
    )
    run.train_dataset = [{"pixel_values": x, "labels": y} for x, y in two_classes()]
    run.train()
    assert (learner.pairs, learner.skipped.total()) == (12, 0)
    check_joined(model.labels)
