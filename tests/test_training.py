"""The interleaved loop, end to end on a problem where the best policy is known."""

import json

import pytest
import torch
from torch import nn

from ola_augment import (
    GARUpdater,
    GradientAlignment,
    NSLRUpdater,
    OLAAugment,
    OLALearner,
    Operation,
    SearchSpace,
    Thermostat,
    UniformAugment,
)
from ola_augment.plots import augmented_samples, describe, policy_over_time
from ola_augment.training import accuracy, fit, scale_to_float


class Bright(nn.Module):
    """Tells bright from dark images by a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 2)

    def forward(self, images):
        return self.linear(images.flatten(1) - 0.5)


def bright_or_dark(n=256):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (n,), generator=generator)
    noise = torch.randint(0, 120, (n, 3, 8, 8), generator=generator)
    images = (noise + 120 * labels[:, None, None, None]).to(torch.uint8)
    return list(zip(images.split(32), labels.split(32), strict=True))


SPACE = SearchSpace((Operation("identity"), Operation("invert"), Operation("flip_lr")))


def train(kind=GARUpdater, epochs=20, **options):
    torch.manual_seed(0)
    model = Bright()
    augment = OLAAugment(SPACE, max_ops=1, generator=torch.Generator().manual_seed(0))
    history = fit(
        model,
        bright_or_dark(),
        torch.optim.SGD(model.parameters(), lr=0.05),
        epochs=epochs,
        augment=augment,
        updater=kind(augment.policy),
        progress=False,
        **options,
    )
    return model, augment, history


def test_invert_which_swaps_the_classes_is_unlearned(tmp_path):
    model, augment, history = train(metrics_path=tmp_path / "metrics.jsonl")
    keep = augment.policy.keep_logits.detach().sigmoid()
    assert keep[1] < 0.2
    assert keep[2] > 2 * keep[1]
    assert accuracy(model, bright_or_dark()) > 0.95
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [record["epoch"] for record in history] == list(range(1, 21))
    assert history[-1]["steps"] == 160
    names = ("identity", "invert", "flip_lr")
    assert history[-1]["keep_probs"] == pytest.approx(dict(zip(names, keep.tolist(), strict=True)))
    assert history[-1]["mean_magnitude_bins"] == {}
    assert history[-1]["plain_accuracy"] > 0.9 > history[0]["augmented_accuracy"]
    assert history[-1]["plain_loss"] < history[0]["plain_loss"]


def test_same_seed_same_run():
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            train(epochs=2)[1].policy.named_logits().values(),
            train(epochs=2)[1].policy.named_logits().values(),
            strict=True,
        )
    )


def test_rewards_are_the_alignments_with_the_plain_batch():
    """The first update, computed by hand from per-example gradients."""
    torch.manual_seed(0)
    model = Bright()
    batches = bright_or_dark(64)
    augment = OLAAugment(SPACE, max_ops=1, generator=torch.Generator().manual_seed(0))
    images, actions = augment.augment(batches[0][0])
    twin = Bright()
    twin.load_state_dict(model.state_dict())

    def gradient(model, images, labels):
        loss = nn.functional.cross_entropy(model(scale_to_float(images)), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    shares = [
        gradient(twin, images[i : i + 1], batches[0][1][i : i + 1]) for i in range(len(images))
    ]
    step = gradient(twin, images, batches[0][1])
    with torch.no_grad():
        parameters = nn.utils.parameters_to_vector(twin.parameters()) - 0.05 * step
        nn.utils.vector_to_parameters(parameters, twin.parameters())
    expected = torch.stack(shares) @ gradient(twin, *batches[1])

    seen = []

    class Spy(GARUpdater):
        def step(self, actions, alignments):
            seen.append((actions, alignments))
            return super().step(actions, alignments)

    augment = OLAAugment(SPACE, max_ops=1, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    fit(
        model,
        batches,
        optimizer,
        epochs=1,
        augment=augment,
        updater=Spy(augment.policy),
        engine=GradientAlignment(model, storage="exact"),
        progress=False,
    )
    [(drawn, alignments)] = seen
    assert torch.equal(drawn.ops, actions.ops)
    # the mean loss: each alignment is the example's share
    torch.testing.assert_close(alignments, expected / len(images), rtol=1e-4, atol=1e-6)


def test_next_step_loss_and_no_augmentation_run_in_the_same_loop():
    _, augment, history = train(NSLRUpdater, epochs=6)
    assert augment.policy.keep_logits.detach().abs().max() > 0
    assert history[-1]["reward_mean"] < 0
    for other in (None, UniformAugment("rand_augment")):
        model = Bright()
        history = fit(
            model,
            bright_or_dark(),
            torch.optim.SGD(model.parameters(), lr=0.05),
            epochs=2,
            augment=other,
            evaluate=lambda model=model: {"accuracy": accuracy(model, bright_or_dark())},
            progress=False,
        )
        assert (history[0]["augmented_loss"] is None) == (other is None)
        assert 0 <= history[-1]["accuracy"] <= 1
        assert "keep_probs" not in history[0]


def test_an_odd_number_of_batches_alternates_across_epochs():
    torch.manual_seed(0)
    model = Bright()
    history = fit(
        model,
        bright_or_dark(96),
        torch.optim.SGD(model.parameters(), lr=0.05),
        epochs=2,
        augment=UniformAugment("rand_augment"),
        progress=False,
    )
    assert history[-1]["steps"] == 6


def test_accuracy_restores_the_mode_of_every_part():
    model = Bright()
    model.frozen = nn.BatchNorm2d(3).eval()
    accuracy(model, bright_or_dark())
    assert model.training
    assert not model.frozen.training
    with pytest.raises(ValueError, match="at least one example"):
        accuracy(model, [])


def test_bad_arguments_are_refused():
    model = Bright()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ValueError, match="epochs"):
        fit(model, bright_or_dark(), optimizer, epochs=0)
    updater = GARUpdater(OLAAugment().policy)
    with pytest.raises(ValueError, match="augment"):
        fit(model, bright_or_dark(), optimizer, epochs=1, updater=updater)
    with pytest.raises(ValueError, match="at least one batch"):
        fit(model, [], optimizer, epochs=1, progress=False)


def test_pictures_show_the_policy_and_the_draws(tmp_path):
    _, augment, history = train(epochs=3)
    policy_over_time(history, augment.space).savefig(tmp_path / "policy.png")
    images = bright_or_dark()[0][0][:3]
    figure = augmented_samples(augment, images, draws=2)
    figure.savefig(tmp_path / "samples.png")
    assert len(figure.axes) == 9
    assert figure.axes[0].get_title() == "original"


def test_labels_name_operations_and_signed_magnitudes():
    space = SearchSpace.wide_long()
    actions = OLAAugment(space).policy.sample(1)
    actions.ops[:] = torch.tensor([[3, 15, 0, -1]])
    actions.keep[:] = torch.tensor([[True, True, False, False]])
    actions.magnitude_bins[0, 0], actions.signs[0, 0] = 30, -1
    assert describe(actions, space, 32, 32) == ["rotate -135°\ninvert"]
    actions.keep[:] = False
    assert describe(actions, space, 32, 32) == ["unchanged"]


def test_loaders_and_samplers_are_told_the_epoch():
    class Announced(list):
        def set_epoch(self, epoch):
            seen.append(epoch)

    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = Announced([(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))])
    fit(model, batches, optimizer, epochs=3, progress=False)
    assert seen == [0, 1, 2]
    dataset = torch.utils.data.TensorDataset(torch.zeros(8, 3, 8, 8), torch.zeros(8).long())
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=sampler)
    fit(model, loader, optimizer, epochs=2, progress=False)
    assert sampler.epoch == 1


def test_fit_tells_the_thermostat_the_accuracy_of_plain_batches():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    augment = OLAAugment("rand_augment", strength=1.0)
    thermostat = Thermostat(augment.policy)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    loader = [(images, torch.tensor([0, 0, 0, 1]))] * 4
    learner = OLALearner(model, augment, reference=[loader[0]], thermostat=thermostat)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, loader, optimizer, epochs=2, learner=learner, progress=False)
    assert thermostat.calls == 4
    assert thermostat.accuracy > 0
