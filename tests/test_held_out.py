"""The loss of held-out images at the best temperature, and which of them tell."""

import collections
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ola_augment import OLAAugment, OLALearner
from ola_augment.training.calibration import calibrated
from ola_augment.training.held_out import HeldOut
from ola_augment.training.held_out_batches import halves_of
from ola_augment.training.held_out_sample import sample_of
from ola_augment.training.rejoin import Rejoin


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def examples(start, count):
    return torch.arange(start, start + count).float()[:, None], torch.arange(start, start + count)


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets)


@pytest.mark.parametrize("scale", [1e2, 1e6])
def test_a_model_that_diverged_is_measured_as_one_that_knows_nothing(scale):
    # Outputs of thousands, none of them right: at best the loss of equal probabilities.
    images, labels = torch.eye(4), torch.tensor([1, 2, 3, 0])
    model = nn.Linear(4, 4, bias=False)
    nn.init.eye_(model.weight).data.mul_(scale)
    found = calibrated(model, lambda m, x, y: F.cross_entropy(m(x), y), [(images, labels)])
    assert float(found.detach()) == pytest.approx(math.log(4), abs=1e-3)


def test_the_calibrated_loss_is_the_least_over_temperatures():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=generator)
    model = network()
    targets = (model(inputs) + torch.randn(60, 3, generator=generator)).argmax(1)
    with torch.no_grad():
        model.weight.mul_(6)
        model.bias.mul_(6)  # much too sure
    batches = [(inputs[:30], targets[:30]), (inputs[30:], targets[30:])]
    found = calibrated(model, loss_of, batches)
    outputs = model(inputs).detach()
    best = minimize_scalar(lambda s: float(F.cross_entropy(outputs * s, targets)), (0.01, 1))
    assert best.fun <= float(found.detach()) < best.fun + 0.01
    assert float(found.detach()) < float(F.cross_entropy(outputs, targets)) - 0.3
    found.backward()
    assert model.weight.grad.abs().sum() > 0


def test_what_cannot_be_scaled_is_measured_as_it_is():
    model = network()
    inputs = torch.randn(5, 4)

    def own(model, inputs):
        return model.weight.square().mean() + inputs.mean()

    assert torch.equal(calibrated(model, own, [(inputs,)]), own(model, inputs))


class Outputs(dict):
    """As a ``ModelOutput`` of transformers: entries and attributes are the same."""

    def __setattr__(self, name, value):
        self[name] = value

    __getattr__ = dict.__getitem__


def test_outputs_with_more_than_logits_are_scaled_where_they_are_and_kept_beside():
    inputs, targets = torch.randn(5, 4), torch.arange(5) % 3
    linear = network()
    with torch.no_grad():
        linear.weight.mul_(20)
    pair = collections.namedtuple("pair", "logits other")

    def entries(inputs):
        logits = linear(inputs)
        return Outputs(logits=logits, loss=F.cross_entropy(logits, targets))

    batch = [(inputs,)]
    expected = calibrated(linear, lambda model, x: F.cross_entropy(model(x), targets), batch)
    for model, loss in (
        (entries, lambda model, x: F.cross_entropy(model(x)["logits"], targets)),
        (entries, lambda model, x: F.cross_entropy(model(x).logits, targets)),
        (
            lambda x: pair(linear(x), None),
            lambda model, x: F.cross_entropy(model(x)[0], targets),
        ),
    ):
        torch.testing.assert_close(calibrated(model, loss, batch), expected)
    own = calibrated(entries, lambda model, x: model(x).loss, batch)  # the model's, as it is
    torch.testing.assert_close(own, entries(inputs).loss)


def test_halves_of_a_mapping_that_torch_does_not_know():
    images, targets = examples(1000, 4)
    batch = collections.UserDict(images=images, labels=targets % 2, loss=torch.tensor(0.0))
    train, tell = HeldOut([batch], 0.5).halves
    both = [half[0][0]["labels"].tolist() for half in (train, tell)]
    assert [sorted(labels) for labels in both] == [[0, 1], [0, 1]]
    assert HeldOut([batch], 0.5).examples == 4


@pytest.mark.parametrize("kind", [dict, collections.UserDict])
def test_halves_of_a_mapping_are_those_of_a_tuple(kind):
    """The default collator of transformers puts labels first; images say where one goes."""
    images, labels = torch.rand(12, 3, 2, 2), torch.arange(12) % 2

    def goes(batch):
        halves = HeldOut([batch], 0.5).halves
        return [half[0][0] if len(half[0]) == 1 else {"labels": half[0][1]} for half in halves]

    expected = [half["labels"].tolist() for half in goes((images, labels))]
    found = [half["labels"].tolist() for half in goes(kind(labels=labels, pixel_values=images))]
    assert found == expected
    assert [sum(half) for half in found] == [3, 3]  # of each class a half


def test_what_has_no_batch_dimension_of_its_own_cannot_be_parted():
    images = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    with pytest.raises(ValueError, match=r"of one B, for a trial .* got 3 and 2"):
        _ = HeldOut([(images, [torch.zeros(2, 4), torch.zeros(2, 4)])], 0.5).halves


def test_where_an_image_goes_does_not_hang_on_the_order():
    def halves(order):
        images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        images[:, 0, 0, 0] = torch.arange(64)
        loader = [(images[part], part % 5) for part in order.split(10)]
        return [
            sorted(torch.cat([images[:, 0, 0, 0].long() for images, _ in half]).tolist())
            for half in HeldOut(loader, 0.5).halves
        ]

    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    train, tell = halves(orders[0])
    assert halves(orders[1]) == [train, tell]
    assert sorted(train + tell) == list(range(64))
    for label in range(5):  # of each class a half
        counts = [sum(image % 5 == label for image in half) for half in (train, tell)]
        assert abs(counts[0] - counts[1]) <= 1


def test_every_held_out_image_counts_alike():
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    targets, model = torch.arange(40) % 3, network()
    whole = HeldOut([(inputs, targets)], 0.5, loss_of)
    parts = HeldOut([(inputs[:37], targets[:37]), (inputs[37:], targets[37:])], 0.5, loss_of)
    assert parts.loss(model) == pytest.approx(whole.loss(model), rel=1e-5)


def test_what_is_read_again_after_a_stop_draws_nothing():
    def loader():
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples(0, 6)), 2)

    def loss(model, images, targets):
        return model(images).square().mean()

    model = nn.Linear(1, 2)
    once, again = HeldOut(loader(), 0.5, loss), HeldOut(loader(), 0.5, loss)
    once.gradients(model)
    again.checked(once.state_dict(), model)()
    before = torch.get_rng_state()
    assert again.gradients(model)["weight"].equal(once.gradients(model)["weight"])
    assert again.examples == 6
    assert sum(len(labels) for half in again.halves for _, labels in half) == 6
    rejoin = Rejoin(loader())
    rejoin.check(examples(0, 4))
    rejoin.load_state_dict({"owed": 0.0, "taken": 3})
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("labels", [[[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]], [[2.5]]])
def test_several_labels_and_regression_need_their_loss(labels):
    """Cross entropy takes floats for probabilities, and says nothing."""
    targets = torch.tensor(labels)
    model = nn.Linear(4, targets.shape[1])
    batch = (torch.ones(1, 4), targets)
    with pytest.raises(ValueError, match=r"do not sum to 1 over the classes, .* give the loss of"):
        HeldOut([batch], 0.8).gradients(model)
    assert HeldOut([batch], 0.8, lambda model, *batch: model(batch[0]).sum()).gradients(model)
    mixed = torch.softmax(targets, dim=1).half().float()
    assert HeldOut([(torch.ones(1, 4), mixed)], 0.8).gradients(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("inputs", ["floats", "bytes"])
def test_held_out_images_take_the_precision_of_the_model(dtype, inputs):
    images = torch.arange(0, 256, 16, dtype=torch.uint8).view(4, 4)
    batch = images if inputs == "bytes" else images.float() / 255, torch.tensor([0, 1, 2, 0])
    expected = HeldOut([batch], 0.0).gradients(network())
    found = HeldOut([batch], 0.0).gradients(network().to(dtype))
    for name, gradient in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].float(), gradient, rtol=0.05, atol=0.02)


def sorted_by_class(count=600, classes=10, size=64):
    """Loader of images that lie class by class, as ImageFolder gives them."""
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.arange(count)
    dataset = torch.utils.data.TensorDataset(images, torch.arange(count) * classes // count)
    return torch.utils.data.DataLoader(dataset, size)


def told_apart(batches):
    """Which images are in each half, and how many are in each of its batches."""
    halves = HeldOut(batches, 0.5).halves
    which = [[int(one) for images, _ in half for one in images[:, 0, 0, 0]] for half in halves]
    return which, [[len(labels) for _, labels in half] for half in halves]


def test_of_many_images_some_of_every_class_decide():
    (train, tell), sizes = told_apart(sorted_by_class())
    assert len(train) + len(tell) == 256 == len({*train, *tell})
    for half in (train, tell):
        counts = collections.Counter(image // 60 for image in half)
        assert sorted(counts) == list(range(10))
        assert max(counts.values()) < 25
    assert min(map(min, sizes)) > 20  # a BatchNorm wants more than a few
    again = HeldOut(sorted_by_class(), 0.5)
    before = torch.get_rng_state()
    halves = again.halves
    assert torch.get_rng_state().equal(before)
    assert all(len(labels.unique()) > 5 for half in halves for _, labels in half)


def test_which_of_many_images_decide_does_not_hang_on_the_order():
    loader = sorted_by_class(400)
    shuffled = torch.utils.data.DataLoader(loader.dataset, 50, shuffle=True)
    found = [told_apart(batches)[0] for batches in (loader, shuffled, list(shuffled))]
    assert [[sorted(half) for half in halves] for halves in found] == [
        [sorted(half) for half in found[0]]
    ] * 3


def test_as_many_images_as_decide_stay_in_their_batches():
    for loader in (sorted_by_class(256), sorted_by_class(300, size=300)):
        sample = sample_of(loader, 256)
        assert len(sample) == len(loader)
        for batch, own in zip(loader, sample, strict=True):
            assert all(map(torch.equal, batch, own))


def test_one_batch_of_many_that_are_more_than_decide():
    assert sum(map(len, told_apart(sorted_by_class(700, size=300))[0])) == 300


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, last=None):
        self.last = last
        self.read = 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while self.read != self.last:
            self.read += 1
            yield torch.rand(1, 2, 2, generator=generator), self.read // 1000


@pytest.mark.parametrize(("last", "read"), [(900, 900), (None, 64 * 256)])
def test_of_a_stream_not_more_is_read_than_a_bound(last, read):
    stream = Stream(last)
    sample = sample_of(torch.utils.data.DataLoader(stream, 32), 256)
    assert sum(len(labels) for _, labels in sample) == 256
    assert stream.read == read
    assert last or max(int(labels.max()) for _, labels in sample) == 16


def test_a_sample_of_batches_of_any_structure():
    """Dictionaries, actions, names, a number for a batch, and images of two sizes."""
    policy = OLAAugment(strength=1.0).policy
    batches = [
        {
            "label": torch.full((30,), k % 3),
            "image": torch.rand(30, 1, 4, 4 + k % 2),
            "actions": policy.sample(30),
            "file": [f"{k}-{i}" for i in range(30)],
            "weight": torch.tensor(0.5),
        }
        for k in range(20)
    ]
    for batch in batches:
        batch["image"][:, 0, 0, 0] = batch["label"]
        batch["image"][:, 0, 0, 1] = torch.arange(30)
    sample = sample_of(batches, 256)
    assert sum(len(batch["label"]) for (batch,) in sample) == 256
    for half in halves_of(sample):
        for (batch,) in half:
            size = len(batch["label"])
            assert len(batch["image"]) == len(batch["actions"].keep) == len(batch["file"]) == size
            assert torch.equal(batch["image"][:, 0, 0, 0].long(), batch["label"])
            numbers = [int(file.split("-")[1]) for file in batch["file"]]
            assert batch["image"][:, 0, 0, 1].tolist() == numbers
            assert batch["weight"] == 0.5


def test_batches_without_tensors_are_kept_from_the_start():
    assert sample_of([(str(k),) for k in range(300)], 256) == [(str(k),) for k in range(256)]


def learner_of(held_out, pairs=480, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    return model, OLALearner.recommended(model, OLAAugment(strength=1), held_out, pairs, **options)


def trained_on(size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.arange(size) % 4


def train(model, learner, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        for images, targets in learner.loader([trained_on()]):
            with learner.step(images) as step:
                F.cross_entropy(model(step.images / 255), targets).backward()
            optimizer.step()
            optimizer.zero_grad()


def with_names(size=8):
    return [(*trained_on(size), [f"{index}.png" for index in range(size)])]


def test_names_beside_held_out_images_are_no_hindrance_without_their_return():
    """The advice of the refusal is good: nothing else comes after it."""
    with pytest.raises(ValueError, match=r"of held-out images must .* got Tensor, list: .*rejoin"):
        train(*learner_of(with_names()), 1)
    model, learner = learner_of(with_names(), rejoin=False)
    train(model, learner, 176)  # into the trial
    assert learner.trial.contrast().windows == 0 <= learner.trial._losses[0]
    assert not learner.skipped
    for half in learner._held_out.halves:
        assert all(len(labels) == len(names) == 4 for _, labels, names in half)
    drops = [(images, labels) for images, labels, _ in with_names()]
    train(*learner_of(drops), 1)  # as a collate_fn does


@pytest.mark.parametrize("rejoin", [True, False])
@pytest.mark.parametrize("target_domain", [True, False])
@pytest.mark.parametrize("kind", ["PIL", "arrays", "labels"])
def test_held_out_batches_of_no_tensors_are_refused_with_what_makes_them(
    kind, rejoin, target_domain
):
    images, labels = trained_on()
    batch, made = {
        "PIL": lambda pictures: (
            (pictures, labels),
            (torch.stack([pil_to_tensor(picture) for picture in pictures]), labels),
        ),
        "arrays": lambda _: (
            (images.numpy(), labels.numpy()),
            (torch.from_numpy(images.numpy()), torch.from_numpy(labels.numpy())),
        ),
        "labels": lambda _: (
            (images, labels.tolist()),
            (images, torch.tensor(labels.tolist())),
        ),
    }[kind]([to_pil_image(image) for image in images])
    options = {"rejoin": rejoin, "target_domain": target_domain}
    with pytest.raises(ValueError, match=r"of held-out batches must be tensors .*: v2.PILToTensor"):
        train(*learner_of([batch], **options), 176)
    train(*learner_of([made], **options), 1)


@pytest.mark.parametrize("rejoin", [True, False])
@pytest.mark.parametrize("target_domain", [True, False])
def test_single_examples_of_a_stream_are_refused_with_what_makes_batches(rejoin, target_domain):
    class Examples(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*trained_on(), strict=True))

    options = {"rejoin": rejoin, "target_domain": target_domain}
    with pytest.raises(ValueError, match=r"a single example: DataLoader\(held_out, batch_size=64"):
        train(*learner_of(Examples(), **options), 176)
    train(*learner_of(torch.utils.data.DataLoader(Examples(), 64), **options), 1)


def test_other_held_out_batches_that_are_refused_are_called_so():
    images, labels = trained_on()
    with pytest.raises(ValueError, match=r"^held-out loader must give \(images, targets\)"):
        train(*learner_of([(images, labels, labels, labels)], rejoin=False), 1)


def test_a_held_out_batch_without_an_image_is_refused():
    images, labels = trained_on()
    with pytest.raises(ValueError, match="a batch of no image"):
        HeldOut([(images[:0], labels[:0])], 0.5)
    held = HeldOut(Batches([(images, labels), (images[:0], labels[:0])]), 0.5)
    with pytest.raises(ValueError, match="a batch of no image"):
        _ = held.halves
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    held.gradients(model)
    with pytest.raises(ValueError, match="a batch of no image"):
        held.gradients(model)


class Batches:
    """Batches that are no list."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)
