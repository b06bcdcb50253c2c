"""A run that is stopped anywhere goes on as if nothing had happened; bad steps harm nothing."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import GARUpdater, OLAAugment, OLALearner, Thermostat, UniformAugment
from ola_augment.training import Callback, fit
from ola_augment.training.checkpoint import load_checkpoint

STEPS = 15  # of three epochs of five batches: pairs lie across epochs


class Stop(Callback):
    """Ends the run after a step, as Ctrl-C would."""

    def __init__(self, step):
        self.last = step

    def on_step(self, step, loss):
        if step == self.last:
            raise KeyboardInterrupt


class Noisy:
    """Pre-processing with a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, images):
        return images.float() / 255 + 0.1 * torch.rand(images.shape, generator=self.generator)


class Run:
    def __init__(self, reference="next", learn=True, updater_options=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
            nn.Linear(144, 3),
        )  # fmt: skip
        images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
        labels = torch.randint(0, 3, (20,))
        values = reference == "values"
        if reference in ("held out", "values"):
            reference = [(images[:4], labels[:4]), (images[4:7], labels[4:7])]
        generator = torch.Generator().manual_seed(1)
        draws = torch.Generator().manual_seed(2)
        if not learn:
            self.augment = UniformAugment("rand_augment", generator=draws)
        else:
            strength = 1.0 if values else None
            self.augment = OLAAugment("rand_augment", generator=draws, strength=strength)
        self.learner = None
        if values:
            thermostat = Thermostat(
                self.augment.policy, raise_above=0.4, lower_below=0.3, smoothing=0.5
            )
            self.learner = OLALearner(
                self.model, self.augment, reference=reference, thermostat=thermostat, learn_pairs=6
            )
        elif learn:
            updater = GARUpdater(self.augment.policy, accumulate=3, **(updater_options or {}))
            self.learner = OLALearner(
                self.model, self.augment, reference=reference, updater=updater
            )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.loader = DataLoader(
            TensorDataset(images, labels), batch_size=4, shuffle=True, generator=generator
        )
        self.preprocess = Noisy()

    def fit(self, **options):
        return fit(
            self.model, self.loader, self.optimizer, epochs=3, augment=self.augment,
            learner=self.learner, preprocess=self.preprocess, scheduler=self.scheduler,
            progress=False, **options,
        )  # fmt: skip

    def outcome(self):
        tensors = {**self.model.state_dict(), "draws": self.augment.generator.get_state()}
        if self.learner is not None:
            tensors |= self.augment.policy.state_dict()
        return tensors


def without_times(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


@pytest.mark.parametrize("reference", ["next", "current", "held out", "values", "no learner"])
def test_stopped_at_every_step_and_resumed(reference, tmp_path):
    def make():
        return Run("next", learn=False) if reference == "no learner" else Run(reference)

    whole = make()
    history = without_times(whole.fit(metrics_path=tmp_path / "whole.jsonl"))
    for stop in range(2 if reference != "no learner" else 1, STEPS + 1):
        path = tmp_path / "run.ckpt"
        path.unlink(missing_ok=True)
        # one step more than the checkpoint, where that is possible
        with pytest.raises(KeyboardInterrupt):
            make().fit(
                checkpoint_path=path, checkpoint_every=1, callbacks=[Stop(min(stop + 1, STEPS))]
            )
        torch.manual_seed(99)  # another process
        again = make()
        metrics = tmp_path / "metrics.jsonl"
        assert without_times(again.fit(resume=path, metrics_path=metrics)) == history
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert without_times(lines) == history
        for name, value in whole.outcome().items():
            assert torch.equal(value, again.outcome()[name]), (stop, name)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = Run()
    history = first.fit(checkpoint_path=tmp_path / "run.ckpt")
    again = Run()
    # the odd last batch has no partner: its capture is not saved, the batch before it is
    assert without_times(again.fit(resume=tmp_path / "run.ckpt")) == without_times(history)


def test_a_pair_across_two_epochs_is_saved_when_it_is_complete(tmp_path):
    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        Run().fit(checkpoint_path=path, checkpoint_every=100, callbacks=[Stop(7)])
    state = load_checkpoint(path)
    assert (state["epoch"], state["batches"], state["count"]) == (2, 1, 6)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    Run(learn=False).fit(checkpoint_path=path)
    with pytest.raises(ValueError, match="this one has"):
        Run().fit(resume=path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a checkpoint"):
        Run().fit(resume=path)
    torch.save({"format": "other"}, path)
    with pytest.raises(ValueError, match="format"):
        Run().fit(resume=path)
    with pytest.raises(FileNotFoundError):
        Run().fit(resume=tmp_path / "missing")


@pytest.mark.parametrize("bad", range(6))
@pytest.mark.parametrize("reference", ["next", "current", "held out"])
def test_a_bad_batch_is_skipped_without_harm(bad, reference):
    run = Run(reference)
    calls = []

    def criterion(outputs, targets):
        calls.append(None)
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss * float("nan") if len(calls) == bad + 1 else loss

    history = run.fit(criterion=criterion)
    assert sum(record["skipped_steps"] for record in history) == 1
    assert len(history) == 3
    assert all(
        value.isfinite().all() for value in run.outcome().values() if value.is_floating_point()
    )
    assert history[-1]["reward_std"] is not None


def test_images_that_are_nan_do_not_reach_the_statistics():
    run = Run(learn=False)
    calls = []

    def preprocess(images):
        calls.append(None)
        return images.float() / (0 if len(calls) == 2 else 255)

    run.preprocess = preprocess
    run.fit()
    assert run.model[1].running_mean.isfinite().all()


def test_or_the_run_ends_with_the_model_as_it_was(tmp_path):
    run = Run()
    with pytest.raises(FloatingPointError, match="as it was"):
        run.fit(criterion=lambda x, y: x.sum() * float("nan"), skip_bad_steps=False)
    fresh = Run()
    assert all(map(torch.equal, run.model.state_dict().values(), fresh.model.state_dict().values()))


def test_batches_of_workers_and_dictionaries_and_clipping():
    run = Run()
    pairs = run.loader.dataset

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            image, label = pairs[index]
            return {"image": image, "label": label}

    run.loader = DataLoader(Rows(), batch_size=4)
    assert run.fit(clip_norm=0.1)[-1]["reward_std"] > 0

    run = Run()
    run.loader = DataLoader(pairs, batch_size=4, collate_fn=run.augment.collate, num_workers=0)
    assert run.fit()[-1]["reward_std"] > 0
    run.loader = [(torch.zeros(2, 3, 8, 8),)]
    with pytest.raises(ValueError, match="loader must give"):
        run.fit()
    run.loader = [{"x": 1}]
    with pytest.raises(ValueError, match="keys"):
        run.fit()


def test_a_scaler_changes_neither_the_rewards_nor_the_model():
    one = Run().fit()
    other = Run().fit(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert other[0]["reward_mean"] == pytest.approx(one[0]["reward_mean"], rel=1e-3)
    overflowing = Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    history = overflowing.fit(scaler=scaler, autocast=torch.bfloat16)
    assert all(v.isfinite().all() for v in overflowing.model.parameters())
    assert len(history) == 3


def test_what_does_not_belong_together_is_refused():
    run, other = Run(), Run()
    with pytest.raises(ValueError, match="learner's transform"):
        fit(run.model, run.loader, run.optimizer, epochs=1, augment=other.augment,
            learner=run.learner)  # fmt: skip
    with pytest.raises(ValueError, match="model that is trained"):
        fit(other.model, run.loader, other.optimizer, epochs=1, learner=run.learner)
    with pytest.raises(ValueError, match="give it alone"):
        fit(run.model, run.loader, run.optimizer, epochs=1, learner=run.learner,
            updater=run.learner.updater)  # fmt: skip
    for options in ({"clip_norm": 0.0}, {"checkpoint_every": 0}):
        with pytest.raises(ValueError, match=r"positive|at least 1"):
            run.fit(**options)
