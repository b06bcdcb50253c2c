"""What people bring to fit: loaders, metrics, optimizers, held-out batches of any kind."""

import contextlib

import numpy as np
import pytest
import torch
from loops import dataset, learner_of, loader, logits, network, optimizer_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision import tv_tensors

from ola_augment import OLAAugment, OLALearner
from ola_augment.integrations.pairs import Pairs
from ola_augment.training import Callback, TensorBoardLogger, fit


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(16))


def run(model, data=None, **options):
    data = loader(16) if data is None else data
    optimizer = options.pop("optimizer", None) or optimizer_of(model)
    epochs = options.pop("epochs", 1)
    return fit(model, data, optimizer, epochs=epochs, progress=False, **options)


def test_a_loader_over_a_stream_has_no_length():
    model = network()
    learner = learner_of(model)
    [record] = run(model, DataLoader(Stream(), batch_size=4), learner=learner)
    assert record["steps"] == 4
    assert learner.pairs == 2


def test_a_stream_that_held_out_images_join_is_read_once_an_epoch_and_resumed(tmp_path):
    class Counted(Stream):
        read = 0

        def __iter__(self):
            for example in dataset(16):
                Counted.read += 1
                yield example

    class Stop(Callback):
        def on_step(self, step, loss):
            if step == 7:
                raise KeyboardInterrupt

    def trained(**options):
        model = network()
        augment = OLAAugment("rand_augment", strength=1.0).freeze()
        learner = OLALearner(model, augment, reference=[dataset(8)[:]], rejoin=True)
        augment.generator = torch.Generator().manual_seed(0)
        data, path = DataLoader(Counted(), batch_size=4), tmp_path / "run.ckpt"
        options |= {"checkpoint_path": path, "checkpoint_every": 2, "epochs": 2}
        run(model, data, learner=learner, **options)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), learner.epoch

    expected, epoch = trained()
    assert Counted.read == 32
    assert epoch.state_dict() == {"longest": 16, "seen": 16}
    with pytest.raises(KeyboardInterrupt):
        trained(callbacks=[Stop()])
    found, epoch = trained(resume=tmp_path / "run.ckpt")
    assert torch.equal(found, expected)
    assert epoch.state_dict() == {"longest": 16, "seen": 16}


def test_metrics_may_be_numbers_of_numpy_and_torch(tmp_path):
    model = network()
    given = {
        "a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": torch.ones(1)[0],
        "e": {"f": np.arange(2)},
    }  # fmt: skip
    files = {"metrics_path": tmp_path / "m.jsonl", "checkpoint_path": tmp_path / "run.ckpt"}
    *_, record = run(model, evaluate=lambda: given, epochs=2, **files)
    found = {name: record[name] for name in given}
    assert found == {"a": 0.5, "b": 3, "c": 0.25, "d": 1.0, "e": {"f": [0, 1]}}
    assert (tmp_path / "run.ckpt").is_file()
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


class Modal(torch.optim.SGD):
    def train(self):
        pass

    def eval(self):
        pass


def test_what_is_stepped_in_another_way_is_refused():
    model = network()
    sgd = optimizer_of(model)
    for options, message in (
        ({"optimizer": torch.optim.LBFGS(model.parameters())}, "LBFGS asks for the loss"),
        ({"optimizer": Modal(model.parameters(), lr=0.1)}, "Modal has modes"),
        (
            {"optimizer": sgd, "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)},
            "step ReduceLROnPlateau in a callback",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            run(model, **options)


def test_tensorboard_hides_the_steps_that_are_run_again(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((1, 2, 3, 4), (3, 4, 5)):  # resumed from a checkpoint after step 2
        logger = TensorBoardLogger(tmp_path)
        for step in steps:
            logger.on_step(step, float(step))
        logger.on_epoch({"epoch": 1, "steps": steps[-1], "plain_loss": 1.0})
        logger.writer.close()
    found = events.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5]


class WithLogits(nn.Sequential):
    def forward(self, images):
        from types import SimpleNamespace

        return SimpleNamespace(logits=super().forward(images))


def held_out_step(model, held_out):
    augment = OLAAugment("rand_augment")
    learner = OLALearner(model, augment, reference=held_out)
    images, targets = next(iter(loader(16)))
    torch.manual_seed(0)
    for _ in range(2):
        with learner.augmented_step() as step:
            outputs = model(learner.augment(images).float() / 255)
            outputs = getattr(outputs, "logits", outputs)
            nn.functional.cross_entropy(outputs, targets).backward()
        with learner.plain_step():
            pass
    assert step.stats.stepped
    return logits(learner)


def test_held_out_batches_of_every_kind():
    pairs = list(loader(16))
    expected = held_out_step(network(), pairs)
    named = [{"image": x, "label": y} for x, y in pairs]
    for model, batches in ((network(), named), (WithLogits(*network()), pairs)):
        torch.testing.assert_close(held_out_step(model, batches), expected)
    images, targets = pairs[0]
    with pytest.raises(ValueError, match=r"got tensors; \[\(images, targets\)\] is one batch"):
        held_out_step(network(), (images, targets))


def test_a_head_that_is_replaced_while_the_mean_runs():
    model = network()
    learner = learner_of(model, reference=list(loader(16)))
    images, targets = next(iter(loader(16)))
    for classes in (3, 5):
        model[-1] = nn.Linear(144, classes)
        with learner.augmented_step() as step:
            outputs = model(learner.augment(images).float() / 255)
            nn.functional.cross_entropy(outputs, targets).backward()
        with learner.plain_step():
            pass
    assert step.stats.stepped


class Masked(torch.utils.data.Dataset):
    """Bright squares, and where they are."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        mask = torch.zeros(8, 8, dtype=torch.long)
        mask[2:5, 1:6] = 1
        return tv_tensors.Image((200 * mask).byte().expand(3, -1, -1)), tv_tensors.Mask(mask)


def test_masks_that_would_stay_where_they_are_are_said():
    def train(**options):
        model, augment = nn.Conv2d(3, 2, 1), OLAAugment()
        collate = augment.collate if options.get("workers_augment") else None
        learner = OLALearner(model, augment)
        run(model, DataLoader(Masked(), batch_size=4, collate_fn=collate), learner=learner)

    said = "a mask stays where it is while operations move"
    with pytest.warns(UserWarning, match=said):
        train()
    images, masks = OLAAugment().collate_plain([Masked()[0]] * 4)
    pairs = Pairs(OLALearner(nn.Conv2d(3, 2, 1), OLAAugment()))
    half = pairs.batch({"pixel_values": images, "labels": masks}, 1)
    with pytest.warns(UserWarning, match=said), contextlib.suppress(KeyError), half:
        raise KeyError
    train(workers_augment=True)  # which would raise what it warned of
    _, masks, _ = OLAAugment(generator=torch.Generator().manual_seed(0)).collate([Masked()[0]] * 16)
    assert len(masks.unique(dim=0)) > 4
