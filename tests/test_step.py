"""One loop body for both halves of a pair, and what is said where a loop goes wrong quietly."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import OLAAugment, OLALearner, ValueUpdater
from ola_augment.alignment import DirectionalAlignment
from ola_augment.training.checks import HeldOutClasses

B = 8


def batch(seed, size=B):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.arange(size) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 3))


def transform(**options):
    return OLAAugment(
        "rand_augment", generator=torch.Generator().manual_seed(1), **(options or {"max_ops": 2})
    )


def normalize(images):
    return (images.float() / 255 - 0.5) / 0.25


class Loop:
    """One body; ``blocks`` writes both halves out."""

    def __init__(self, reference="next", blocks=False, size=B, **options):
        self.model = network()
        self.learner = OLALearner(self.model, transform(), reference=reference, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.blocks = blocks
        self.size = size
        self.count = 0

    def backward(self, images, targets):
        F.cross_entropy(self.model(images / 255), targets).backward()

    def step(self, **options):
        images, targets = batch(self.count, self.size)
        augmented = self.count % 2 == self.learner.plain_first
        if not self.blocks:
            with self.learner.step(images, **options) as step:
                self.backward(step.images, targets)
            assert step.augmented == augmented
        elif augmented:
            with self.learner.augmented_step(**options) as step:
                self.backward(self.learner.augment(images), targets)
        else:
            with self.learner.plain_step(**options) as step:
                self.backward(images, targets)
        self.count += 1
        if not self.learner.plain_first or self.count % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return step

    def weights(self):
        state = [*self.learner.policy.state_dict().values(), *self.model.state_dict().values()]
        return torch.cat([value.flatten().double() for value in state])


@pytest.mark.parametrize("reference", ["next", "current", [batch(99)]])
def test_one_body_is_the_two_blocks_bit_for_bit(reference):
    one, two = Loop(reference), Loop(reference, blocks=True)
    start = one.weights()
    stats = [one.step().stats for _ in range(6)]
    for _ in range(6):
        two.step()
    torch.testing.assert_close(one.weights(), two.weights(), rtol=0, atol=0)
    assert not torch.equal(one.weights(), start)
    assert one.learner.pairs == 3
    assert sum(found is not None for found in stats) == 3


def test_the_plain_half_sees_the_images_as_they_are():
    loop = Loop()
    first, second = loop.step(), loop.step()
    assert not torch.equal(first.images, batch(0)[0])
    assert torch.equal(second.images, batch(1)[0])
    assert (first.augmented, second.augmented) == (True, False)


def test_micro_batches_stay_in_their_half():
    loop = Loop(micro_batches=2)
    kinds = []
    for index in range(8):
        images, targets = batch(index)
        with loop.learner.step(images) as step:
            loop.backward(step.images, targets)
        kinds.append(step.augmented)
        if index % 2:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert kinds == [True, True, False, False] * 2
    assert loop.learner.pairs == 2
    announced = Loop()
    kinds = []
    for index, last in enumerate((False, False, True, True)):
        images, targets = batch(index)
        with announced.learner.step(images, last=last) as step:
            announced.backward(step.images, targets)
        kinds.append(step.augmented)
        if last:
            announced.optimizer.step()
            announced.optimizer.zero_grad()
    assert kinds == [True, True, True, False]


def test_between_the_micro_batches_of_an_update_nothing_is_saved():
    loop = Loop(reference=[batch(99)])
    images, targets = batch(0)
    with loop.learner.step(images, last=False) as step:
        loop.backward(step.images, targets)
    with pytest.raises(RuntimeError, match=r"save after optimizer\.step\(\), .* micro-batch, or"):
        loop.learner.state_dict()
    with loop.learner.step(images, last=True) as step:
        loop.backward(step.images, targets)
    assert loop.learner.state_dict()["pairs"] == 0  # the plain half may follow later


def test_workers_images_are_not_augmented_again():
    learner = OLALearner(network(), augment := transform())
    images, targets = batch(0)
    for _ in range(2):
        seen, actions = augment.augment(images)
        with learner.step(seen, actions=actions) as step:
            F.cross_entropy(learner._model(step.images / 255), targets).backward()
        assert step.images is seen
        learner._model.zero_grad()
    assert learner.pairs == 1
    assert not learner.skipped


def test_stopped_between_the_halves_it_goes_on_with_the_other():
    reference = [batch(99), batch(98)]
    whole, stopped = Loop(reference), Loop(reference)
    for loop in (whole, stopped):
        for _ in range(3):
            loop.step()
    again = Loop(reference)
    again.model.load_state_dict(stopped.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(stopped.optimizer.state_dict()))
    again.learner.load_state_dict(stopped.learner.state_dict())
    again.count = 3
    for loop in (whole, again):
        for _ in range(3):
            loop.step()
    torch.testing.assert_close(whole.weights(), again.weights(), rtol=0, atol=0)


def test_after_an_error_a_pair_begins_anew():
    loop = Loop()
    with pytest.raises(ZeroDivisionError), loop.learner.step(batch(0)[0]):
        raise ZeroDivisionError
    assert loop.step().augmented
    loop.step()
    assert (loop.learner.pairs, dict(loop.learner.skipped)) == (1, {"given up": 1})


def test_images_of_a_step_that_nobody_trained_on_are_said():
    loop = Loop()
    images, targets = batch(0)
    with (
        pytest.raises(RuntimeError, match=r"step\.images was not used in an augmented step"),
        loop.learner.step(images),
    ):
        loop.backward(images, targets)
    assert dict(loop.learner.skipped) == {"given up": 1}
    loop.optimizer.zero_grad()
    loop.step()
    with loop.learner.step(images):  # the plain half sees them as they are
        loop.backward(images, targets)
    assert loop.learner.pairs == 1


def test_an_engine_that_takes_the_batch_is_refused():
    model = network()
    engine = DirectionalAlignment(model, lambda outputs, targets: outputs.sum(1))
    learner = OLALearner(model, transform(), engine=engine)
    with pytest.raises(RuntimeError, match="computes the losses"), learner.step(batch(0)[0]):
        pass


def run_halves(learner, model, half, count):
    images, targets = batch(0)
    for _ in range(count):
        if half == "augmented":
            with learner.augmented_step():
                F.cross_entropy(model(learner.augment(images) / 255), targets).backward()
        else:
            with learner.plain_step():
                F.cross_entropy(model(images / 255), targets).backward()
        model.zero_grad()


@pytest.mark.parametrize("half", ["augmented", "plain"])
def test_one_kind_of_steps_alone_is_said(half):
    model = network()
    learner = OLALearner(model, transform(), reference=[batch(99)])
    run_halves(learner, model, half, 9)
    with pytest.warns(UserWarning, match=f"10 {half} steps in a row without the other half"):
        run_halves(learner, model, half, 3)
    run_halves(learner, model, half, 12)  # once
    frozen = OLALearner(model, transform(), reference=[batch(99)])
    frozen.transform.freeze()
    run_halves(frozen, model, half, 12)  # where nothing is learned, nothing is missed


def test_a_batch_of_one_is_said():
    model = network()
    learner = OLALearner.recommended(model, transform(strength=1), [batch(99)], pairs=500)

    def run():
        for index in range(80):
            images, targets = batch(index, 1)
            with learner.step(images) as step:
                F.cross_entropy(model(step.images / 255), targets).backward()
            model.zero_grad()

    with pytest.warns(UserWarning, match="there is only one"):
        run()


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (batch(0), r"got tensors; \[\(images, targets\)\] is one batch"),
        (tuple(part.numpy() for part in batch(0)), r"got tensors"),
        (TensorDataset(*batch(0)), "DataLoader"),
        ([(batch(0)[0][0], 2), (batch(0)[0][1], 1)], "got a single example"),
        ([{"image": batch(0)[0][0], "label": 2}], "got a single example"),
    ],
)
def test_what_is_no_batches_is_refused_at_once(held_out, message):
    with pytest.raises(ValueError, match=message):
        OLALearner.recommended(network(), transform(strength=1), held_out, pairs=500)


def test_single_examples_of_a_loader_are_refused_where_they_come():
    loader = DataLoader(TensorDataset(*batch(0)), batch_size=None)
    loop = Loop(loader)
    with pytest.raises(ValueError, match="got a single example"):
        loop.step()


def forgetful(reference, zero_grad, steps=6, inside=False):
    loop = Loop(reference)
    for index in range(steps):
        images, targets = batch(index)
        with loop.learner.step(images) as step:
            if inside:
                zero_grad(loop.optimizer)
            loop.backward(step.images, targets)
        if loop.learner.plain_first and index % 2 == 0:
            continue
        nn.utils.clip_grad_norm_(loop.model.parameters(), 1e9)
        loop.optimizer.step()
        if not inside:
            zero_grad(loop.optimizer)


@pytest.mark.parametrize("reference", [[batch(99)], "current"])
def test_zero_grad_that_was_forgotten_is_said(reference):
    with pytest.warns(UserWarning, match=r"call optimizer.zero_grad\(\) after each") as told:
        forgetful(reference, lambda optimizer: None)
    assert len(told) == 1


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("to_none", [False, True])
@pytest.mark.parametrize("reference", [[batch(99)], "current"])
def test_zero_grad_anywhere_is_enough(reference, to_none, inside):
    if inside and reference == "current":
        return  # both halves make one gradient
    forgetful(reference, lambda optimizer: optimizer.zero_grad(set_to_none=to_none), inside=inside)


def test_gradients_that_gather_before_one_step_are_no_mistake():
    loop = Loop([batch(99)])
    for index in range(8):
        images, targets = batch(index)
        with loop.learner.step(images) as step:
            loop.backward(step.images, targets)
        if index % 2:  # one update a pair
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert loop.learner.pairs == 4


def run_recommended(model, prepare, pairs=6, held_out=None, **options):
    augment = transform(strength=1)
    held_out = [batch(99)] if held_out is None else held_out
    learner = OLALearner.recommended(model, augment, held_out, pairs=500, **options)
    for index in range(2 * pairs):
        images, targets = batch(index)
        with learner.step(images) as step:
            F.cross_entropy(model(prepare(step.images)), targets).backward()
        model.zero_grad()
    return learner


class TakesLevels(nn.Module):
    """Normalises by itself."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, images):
        return self.network((images.float() - 127) / 64)


@pytest.mark.parametrize(
    ("model", "prepare", "ranges"),
    [
        (network, normalize, r"\[0, 1\] for held-out images and in \[-2, 2\] for training"),
        (TakesLevels, torch.Tensor.float, r"\[0, 1\] for held-out images and in \[0, 255\]"),
    ],
)
def test_inputs_of_another_range_are_said(model, prepare, ranges):
    with pytest.warns(UserWarning, match=f"{ranges}.*preprocess=") as told:
        run_recommended(model(), prepare)
    assert len(told) == 1
    run_recommended(model(), prepare, preprocess=prepare)


def test_held_out_images_normalised_twice_or_alone_are_said():
    normalized = [(normalize(batch(99)[0]), batch(99)[1])]
    with pytest.warns(UserWarning, match=r"in \[-2, 2\] for held-out images and in \[0, 1\]"):
        run_recommended(network(), lambda images: images / 255, held_out=normalized)


def test_dark_images_and_other_models_inputs_are_no_mistake():
    dark = [(batch(99)[0] // 10, batch(99)[1])]
    run_recommended(network(), lambda images: images / 255, held_out=dark)
    run_recommended(network(), normalize, held_out=dark, preprocess=normalize)


def test_held_out_images_of_one_class_are_said():
    images, _ = batch(99)
    with pytest.warns(UserWarning, match=r"of one class \(2\)"):
        run_recommended(
            network(), lambda images: images / 255, held_out=[(images, torch.full((B,), 2))]
        )
    # what a trial looks at, where nothing else does
    with pytest.warns(UserWarning, match=r"of one class \(0\)"):
        run_recommended(
            network(),
            lambda images: images / 255,
            pairs=110,
            held_out=[(images, torch.zeros(B, dtype=torch.long))],
            target_domain=False,
        )


def test_held_out_batches_sorted_by_class_are_said():
    images, _ = batch(99)
    held_out = [(images, torch.full((B,), label)) for label in range(3)]
    with pytest.warns(UserWarning, match="of a single class: shuffle"):
        run_recommended(network(), lambda images: images / 255, pairs=20, held_out=held_out)


@pytest.mark.parametrize(("order", "said"), [("sorted", True), ("shuffled", False)])
def test_held_out_batches_of_few_classes_each_are_said(order, said):
    labels = torch.arange(240) // 24  # ten classes; two of them, or one, in a batch that is sorted
    if order == "shuffled":
        labels = labels[torch.randperm(240, generator=torch.Generator().manual_seed(0))]
    classes = HeldOutClasses()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for k, part in enumerate(labels.split(32)):
                classes.see((torch.zeros(len(part), 3, 8, 8), part), first=k == 0)
    found = [str(warning.message) for warning in caught]
    assert found == [text for text in found if "hold 1.9 of 10 classes on average: shuffle" in text]
    assert len(found) == said


def test_where_few_batches_were_seen_the_others_have_a_word():
    """Of images in the order of their classes some of the first are of one class."""
    images = torch.zeros(8, 3, 8, 8)
    batches = [(images, torch.full((8,), label)) for label in (0, 0, 0, 1, 2)]
    classes = HeldOutClasses()
    classes.see(batches[0], first=True)
    with pytest.warns(UserWarning, match="of a single class: shuffle"):
        classes.whole(batches)


def test_labels_that_are_none_say_nothing():
    def loss(model, images, targets):
        return model(images / 255).square().mean() + 0 * targets.sum()

    held_out = [(batch(99)[0], torch.zeros(B, 3))]
    run_recommended(network(), lambda images: images / 255, held_out=held_out, loss=loss)


def test_few_pairs_are_said():
    with pytest.warns(UserWarning, match="90 pairs of steps are too few"):
        OLALearner.recommended(network(), transform(strength=1), [batch(99)], pairs=90)


def test_a_copy_has_no_tensors_of_the_loop():
    loop = Loop([batch(99)])
    loop.step()
    loop.step()
    twin = copy.deepcopy(loop.learner)
    assert isinstance(loop.learner.updater, type(twin.updater))
    assert not isinstance(twin.updater, ValueUpdater)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.step()
