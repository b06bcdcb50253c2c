"""Held-out images that come back into the training: how many, when, and after a stop."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ola_augment import OLAAugment, OLALearner, SplitBatchSampler, SplitPolicy
from ola_augment.training import Trial
from ola_augment.training.epoch import known_size
from ola_augment.training.rejoin import Rejoin, Rejoined


def examples(start, count):
    return torch.arange(start, start + count).float()[:, None], torch.arange(start, start + count)


def test_held_out_examples_join_in_proportion():
    held = [examples(1000, 5), examples(1005, 3)]
    mixed = Rejoin(held)
    found = []
    for k in range(30):
        inputs, targets = mixed.mix(examples(10 * k, 10), train_size=24)
        assert torch.equal(inputs[:, 0].long(), targets)
        assert len(targets) == 10
        found += targets[targets >= 1000].tolist()
    assert len(found) == int(300 * 8 / 32)
    passes = [found[start : start + 8] for start in range(0, 72, 8)]
    assert all(sorted(one) == list(range(1000, 1008)) for one in passes)  # each as often
    assert len({tuple(one) for one in passes}) > 1  # in another order


@pytest.mark.parametrize(
    ("target_domain", "pairs", "share"),
    [(True, 1200, 2 * 8 / (2 * 8 + 24)), (False, 1200, 8 / 32), (True, 40, 8 / 32)],
)
@pytest.mark.filterwarnings("ignore:40 pairs of steps are too few")
def test_a_target_domain_that_was_held_out_makes_up_for_it(target_domain, pairs, share):
    model, augment = nn.Linear(1, 2), OLAAugment(strength=1.0)
    learner = OLALearner.recommended(
        model, augment, [examples(1000, 8)], pairs, target_domain=target_domain
    )

    def joined():
        batches = [learner.rejoin(examples(0, 10), 24)[1] for _ in range(40)]
        return int((torch.cat(batches) >= 1000).sum())

    if learner.trial.windows:
        learner.pairs = learner.trial.joins
        half = sum(len(targets) for _, targets in learner._held_out.halves[0])
        assert joined() == int(400 * half / (half + 24))
        learner.pairs = pairs
    learner.trial.over = True
    assert joined() == int(400 * share)


@pytest.mark.parametrize("rejoin", [-1.0, float("inf"), float("nan")])
def test_how_often_they_come_back_is_checked(rejoin):
    with pytest.raises(ValueError, match="rejoin must be a bool or a number above 0"):
        OLALearner(
            nn.Linear(1, 2), OLAAugment(strength=1.0), reference=[examples(0, 4)], rejoin=rejoin
        )


@pytest.mark.parametrize("target_domain", [True, False])
def test_half_of_them_wait_for_the_trial_and_the_others_for_nothing_but_learning(target_domain):
    model, augment = nn.Linear(1, 2), OLAAugment(strength=1.0)
    held = [examples(1000, 8)]
    learner = OLALearner.recommended(model, augment, held, 1200, target_domain=target_domain)

    def joined():
        seen = {int(t) for _ in range(20) for t in learner.rejoin(examples(0, 10), 24)[1]}
        return sorted(seen - set(range(10)))

    half = sorted(learner._held_out.halves[0][0][1].tolist())
    assert 1 < len(half) < 7
    assert joined() == ([] if target_domain else half)
    learner.pairs = learner.trial.joins
    assert joined() == half
    learner.pairs, learner.trial.over = 1200, True
    assert joined() == list(range(1000, 1008))


def test_a_stopped_run_mixes_on_as_if_it_had_not():
    held = [examples(1000, 5), examples(1005, 3)]
    one, other = Rejoin(held), Rejoin(held)
    for _ in range(7):
        one.mix(examples(0, 10), 24)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(5):
        assert torch.equal(one.mix(examples(0, 10), 24)[1], other.mix(examples(0, 10), 24)[1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("batches", [0, 3, 4, 7])
def test_a_copy_mixes_on_as_the_original_does(copied, batches):
    """Whatever of a pass was used: nothing, a part of it, a whole one."""
    one = Rejoin([examples(1000, 5), examples(1005, 3)])
    for _ in range(batches):
        one.mix(examples(0, 8), 24)  # two of eight
    other = copied(one)
    restored = Rejoin([examples(1000, 5), examples(1005, 3)])
    restored.load_state_dict(other.state_dict())
    again = copied(other)  # of a copy that did not go on yet
    before = torch.get_rng_state()
    for _ in range(6):
        expected = one.mix(examples(0, 8), 24)[1]
        for found in (other, restored, again):
            assert torch.equal(found.mix(examples(0, 8), 24)[1], expected)
            assert found.state_dict() == one.state_dict()
    assert torch.get_rng_state().equal(before)


def test_a_learner_that_is_set_back_mixes_as_it_did():
    learner = OLALearner.recommended(
        nn.Linear(1, 2), OLAAugment(strength=1.0), [examples(1000, 8)], 1200, target_domain=False
    )
    state = copy.deepcopy(learner.state_dict())

    def joined():
        return [learner.rejoin(examples(0, 10), 24)[1].tolist() for _ in range(3)]

    once = joined()
    learner.load_state_dict(state)
    assert joined() == once


@pytest.mark.filterwarnings("ignore:all held-out images are of one class")
def test_a_half_without_an_image_is_resumed():
    batches = [examples(1000, 1)]  # a lone image tells
    learner, other = (
        OLALearner.recommended(
            nn.Linear(1, 2), OLAAugment(strength=1.0), batches, 1200, target_domain=False
        )
        for _ in range(2)
    )
    learner.rejoin(examples(0, 10), 24)
    other.load_state_dict(learner.state_dict())
    assert other.rejoin(examples(0, 10), 24)[1].tolist() == list(range(10))


def test_without_a_trial_they_join_after_the_learning():
    augment = OLAAugment(strength=1.0)
    trial = Trial(augment.policy, 4, 0)
    learner = OLALearner(
        nn.Linear(1, 2), augment, reference=[examples(1000, 8)], learn_pairs=4, trial=trial,
        rejoin=True,
    )  # fmt: skip
    assert max(learner.rejoin(examples(0, 10), 24)[1]) < 1000
    learner.pairs = 4
    assert max(learner.rejoin(examples(0, 10), 24)[1]) >= 1000


class Stream(torch.utils.data.IterableDataset):
    def __init__(self):
        self.read = 0

    def __iter__(self):
        for pair in zip(*examples(0, 24), strict=True):
            self.read += 1
            yield pair


def test_a_stream_is_read_once_an_epoch():
    learner = OLALearner.recommended(
        nn.Linear(1, 2), OLAAugment(strength=1.0).freeze(), [examples(1000, 8)], 1200
    )
    stream = Stream()
    loader = torch.utils.data.DataLoader(stream, batch_size=6)
    for _ in range(2):
        joined = [int((targets >= 1000).sum()) for _, targets in learner.loader(loader)]
    assert stream.read == 48
    assert joined == [1, 2, 1, 2]  # 6 * 8 / (8 + 24) a batch, from the second epoch on
    other = copy.deepcopy(learner)
    other.load_state_dict(learner.state_dict())
    assert other.epoch.state_dict() == learner.epoch.state_dict() == {"longest": 24, "seen": 24}


@pytest.mark.parametrize("name", ["rejoin", "rejoin_half"])
def test_a_damaged_state_of_what_joined_changes_nothing(name):
    learner = OLALearner.recommended(
        nn.Linear(1, 2), OLAAugment(strength=1.0), [examples(1000, 8)], 1200, target_domain=False
    )
    learner.rejoin(examples(0, 10), 24)
    state = copy.deepcopy(learner.state_dict())
    learner.pairs = 3
    for damaged in ({"owed": 0.0}, {"owed": 0.0, "taken": -1}, {"owed": math.nan, "taken": "2"}):
        with pytest.raises(ValueError, match="held-out images that joined is damaged"):
            learner.load_state_dict({**state, name: damaged})
        assert learner.pairs == 3


def test_a_loader_that_they_join_can_be_copied():
    loader = Rejoined([examples(0, 4)], learner=None)
    assert len(copy.deepcopy(loader)) == 1


def test_no_held_out_batch_is_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="no batch"):
        OLALearner.recommended(nn.Linear(1, 2), OLAAugment(strength=1.0), [], 1200)
    empty = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(0, 1)))
    learner = OLALearner.recommended(nn.Linear(1, 2), OLAAugment(strength=1.0), empty, 1200)
    with pytest.raises(ValueError, match="no batch"):
        list(learner.loader([examples(0, 4)]))


def test_held_out_batches_that_cannot_join_are_refused():
    images, targets = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    rejoin = Rejoin([(images, targets)])
    rejoin.check((images, targets))
    for other in (
        (images.byte(), targets),
        (images[:, :1], targets),
        (images,),
        [images, targets, targets],
    ):
        with pytest.raises(ValueError, match="rejoin=False"):
            rejoin.check(other)
    with pytest.raises(ValueError, match="must consist of tensors"):
        rejoin.check((images, "names"))


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floats_join_those_of_another_precision(own, held):
    images, targets = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.long)
    rejoin = Rejoin([(images.to(held) / 2, targets)])
    rejoin.check((images.to(own), targets))
    mixed = rejoin.mix((images.to(own), targets), train_size=4)
    assert mixed[0].dtype == own
    assert mixed[0][:, 0, 0, 0].tolist() == [0.5, 0.5, 0.25, 0.25]


def test_images_in_a_list_are_refused_before_they_are_mixed():
    """As those of detection: the first dimension of each is its channels, not its batch."""

    def batch(images):
        boxes = [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(2)} for _ in range(images)]
        return [torch.zeros(3, 8, 8)] * images, boxes

    with pytest.raises(ValueError, match=r"of one B, .* got 2 and 3: .* or leave held-out"):
        Rejoin([batch(4)]).check(batch(4))
    with pytest.raises(ValueError, match="of one B"):
        Rejoin([batch(4)]).mix(batch(4), 12)


def test_number_of_images_in_an_epoch():
    batches = [examples(0, 4), examples(4, 4)]
    dataset = torch.utils.data.TensorDataset(*examples(0, 9))
    assert known_size(batches) == 8
    assert known_size(torch.utils.data.DataLoader(dataset, batch_size=4)) == 9
    whole = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    assert known_size(whole) == 8

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*examples(0, 9), strict=True))

    stream = torch.utils.data.DataLoader(Stream(), batch_size=4)
    assert known_size(stream) is None


class Sharing(torch.utils.data.BatchSampler):
    """As accelerate's: each of two processes has every other batch of another one."""

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler
        self.batch_size = batch_sampler.batch_size

    def __iter__(self):
        return itertools.islice(self.batch_sampler, 0, None, 2)

    def __len__(self):
        return len(self.batch_sampler) // 2


class Passing:
    """A loader around another one, as timm's."""

    def __init__(self, loader):
        self.dataset, self.sampler = loader.dataset, loader.sampler


class Unknown(torch.utils.data.Sampler):
    def __iter__(self):
        return iter([[0, 1], [2]])


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"sampler": SubsetRandomSampler(range(5))}, 5),
        ({"sampler": WeightedRandomSampler([1.0] * 9, 20)}, 20),
        ({"sampler": DistributedSampler(range(9), 4, 0)}, 9),  # padded to 12
        ({"sampler": DistributedSampler(range(9), 4, 0, drop_last=True)}, 9),
        ({"sampler": DistributedSampler(range(5), 2, 0)}, 5),  # of some of them
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(range(5)), 2, True)}, 5),
        ({"batch_sampler": Sharing(BatchSampler(range(9), 2, False))}, 9),
        ({"batch_sampler": SplitBatchSampler(SplitPolicy(2), [[0, 1], [2, 3]], 3, 4)}, 12),
        ({"batch_sampler": [[0, 1], [2], [3, 4, 5]]}, 6),
        ({"batch_sampler": Unknown()}, None),
    ],
)
def test_number_of_images_in_an_epoch_is_that_of_its_sampler(options, size):
    dataset = torch.utils.data.TensorDataset(*examples(0, 9))
    before = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(dataset, **options)
    assert known_size(loader) == size
    assert "batch_sampler" in options or known_size(Passing(loader)) == size
    assert torch.get_rng_state().equal(before)


def test_number_of_images_in_an_epoch_of_a_stream_that_has_a_length():
    class Known(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*examples(0, 9), strict=True))

        def __len__(self):
            return 9

    assert known_size(torch.utils.data.DataLoader(Known(), batch_size=4)) == 9


def test_batches_of_any_structure_are_joined():
    """A mapping in any order, a batch of workers that augmented, and one in a tuple of its own."""
    images, targets = examples(1000, 4)
    augment = OLAAugment(strength=1.0)
    actions = augment.policy.sample(6)
    with torch.no_grad():  # workers drew before the policy learned
        augment.policy.keep_logits[:5] += 1
    plain, labels = examples(0, 6)
    held_out = ([(images, targets)], [{"labels": targets, "image": images}])
    given = (
        (plain, labels),
        [plain, labels],
        {"labels": labels, "pixel_values": plain},
        (plain, labels, actions),
        (plain, labels, tuple(actions)),
        {"actions": actions, "pixel_values": plain, "labels": labels},
    )
    for batches, batch in itertools.product(held_out, given):
        rejoin = Rejoin(batches, augment.policy)
        rejoin.check(batch)
        mixed = rejoin.mix(batch, 4)  # as many as there are held-out ones: every other example
        assert type(mixed) is type(batch)
        named = isinstance(batch, dict)
        found = (mixed["pixel_values"], mixed["labels"]) if named else mixed[:2]
        assert found[1].tolist()[:3] == [0, 1, 2]
        assert min(found[1].tolist()[3:]) >= 1000
        assert torch.equal(found[0][:3], plain[:3])
        last = (list(mixed.values()) if named else mixed)[0 if named else -1]
        if len(batch) == 3:
            assert torch.equal(last.keep[:3], actions.keep[:3])
            assert not last.keep[3:].any()
            assert torch.equal(last.log_prob[:3], actions.log_prob[:3])
            now = augment.policy.log_prob(last).detach()
            torch.testing.assert_close(last.log_prob[3:], now[3:])
