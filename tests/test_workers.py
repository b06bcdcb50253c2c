"""Augmentation inside DataLoader workers."""

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ola_augment import (
    Actions,
    GARUpdater,
    OLAAugment,
    OLAPolicy,
    Operation,
    PolicyTransform,
    SearchSpace,
    UniformPolicy,
)
from ola_augment.streams import _SHARED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    # On a machine with one core torch warns of two workers.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

N = 12


class Augmented(Dataset):
    """A data set that augments each sample: image, label and what was drawn."""

    def __init__(self, augment):
        self.augment = augment
        self.images = torch.full((3, 8, 8), 100, dtype=torch.uint8)

    def __len__(self):
        return N

    def __getitem__(self, index):
        image, actions = self.augment.augment(self.images)
        return image, index, actions, torch.get_num_threads()


def images_and_labels():
    images = torch.randint(0, 256, (N, 3, 8, 8), dtype=torch.uint8)
    return TensorDataset(images, torch.arange(N))


def loader(data, workers, context, persistent, seed=0, **options):
    return DataLoader(
        data,
        batch_size=6,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=persistent,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def draws(batches):
    return [batch[2].ops for batch in batches]


@pytest.mark.parametrize(
    ("context", "persistent", "own_generator"),
    [
        ("fork", False, False),
        ("fork", False, True),
        ("fork", True, False),
        ("fork", True, True),
        ("forkserver", True, True),
    ],
)
def test_every_worker_and_epoch_draws_differently_and_a_seed_repeats(
    context, persistent, own_generator
):
    def two_epochs(seed):
        own = torch.Generator().manual_seed(5) if own_generator else None
        batches = loader(Augmented(OLAAugment(generator=own)), 2, context, persistent, seed)
        return [*batches, *batches]

    batches = two_epochs(0)
    for images, _, actions, threads in batches:
        assert images.shape == (6, 3, 8, 8)
        assert isinstance(actions, Actions)
        assert actions.ops.shape == (6, 4)
        assert (threads == 1).all()
    everything = draws(batches)
    for i, one in enumerate(everything):
        assert not any(torch.equal(one, other) for other in everything[i + 1 :])
    again = draws(two_epochs(0))
    assert all(torch.equal(a, b) for a, b in zip(everything, again, strict=True))
    if context == "fork":
        assert not torch.equal(everything[0], draws(two_epochs(1))[0])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_collate_augments_whole_batches(context):
    augment = OLAAugment("rand_augment")
    data = images_and_labels()
    for images, labels, actions in loader(data, 1, context, False, collate_fn=augment.collate):
        assert torch.equal(images, augment.replay(data.tensors[0][labels], actions))


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_persistent_workers_draw_with_the_current_logits(context):
    augment = OLAAugment("rand_augment")
    batches = loader(images_and_labels(), 2, context, True, collate_fn=augment.collate)
    before = torch.cat([actions.keep[actions.ops >= 0] for _, _, actions in batches])
    with torch.no_grad():
        augment.policy.keep_logits.fill_(-50)
    after = torch.cat([actions.keep[actions.ops >= 0] for _, _, actions in batches])
    assert before.any()
    assert not after.any()


def test_learning_through_workers_reaches_the_policy_of_the_loop():
    """An alignment that punishes one operation, once in the loop and once through workers."""
    space = SearchSpace((Operation("identity"), Operation("invert"), Operation("flip_lr")))

    def punish_invert(actions):
        return -((actions.ops == 1) & actions.keep).any(1).float()

    def learn(batches, augment):
        updater = GARUpdater(augment.policy, lr=0.1)
        for _, _, actions in batches:
            updater.step(actions, punish_invert(actions))
        return augment.policy.keep_logits.detach().sigmoid()

    data = TensorDataset(torch.zeros(6400, 1, 2, 2, dtype=torch.uint8), torch.arange(6400))
    torch.manual_seed(0)
    keeps = []
    for workers in (0, 2):
        augment = OLAAugment(space, max_ops=1)
        batches = DataLoader(
            data,
            batch_size=64,
            num_workers=workers,
            collate_fn=augment.collate,
            generator=torch.Generator().manual_seed(0),
        )
        keeps.append(learn(batches, augment))
    assert all(keep[1] < 0.05 for keep in keeps)
    assert (keeps[0] - keeps[1]).abs().max() < 0.25


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_draw_from_a_copy_repeat_from_a_seed(persistent):
    """The copy follows the policy between epochs, when no worker draws."""

    def learn():
        augment = OLAAugment("rand_augment")
        drawing = copy.deepcopy(augment)
        torch.manual_seed(0)
        collate = {"collate_fn": drawing.collate}
        batches = loader(images_and_labels(), 2, "fork", persistent, **collate)
        updater = GARUpdater(augment.policy, lr=0.1)
        for _ in range(3):
            drawing.policy.load_state_dict(augment.policy.state_dict())
            for _, _, actions in batches:
                torch.testing.assert_close(drawing.policy.log_prob(actions), actions.log_prob)
                updater.step(actions, actions.ops[:, 0].float())
        return nn.utils.parameters_to_vector(augment.policy.named_logits().values())

    assert torch.equal(learn(), learn())


class TwoViews(Dataset):
    """Two transforms of one generator, or of two that were seeded alike."""

    def __init__(self, seeds=(7,), of=lambda views: views):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        cutout = UniformPolicy(SearchSpace((Operation("cutout", 2, 2),)), 1, 1.0)
        self.views = of([PolicyTransform(cutout, generator=g) for g in (generators * 2)[:2]])
        self.images = torch.zeros(3, 8, 8, dtype=torch.uint8)

    def __len__(self):
        return N

    def __getitem__(self, index):
        return [view.augment(self.images)[1].centers for view in self.views]


def drawn_twice(data, workers, context, persistent=False):
    """Centres of both views over two epochs, (2 N, 1, 2) each."""
    batches = loader(data, workers, context, persistent)
    return [torch.cat(views) for views in zip(*batches, *batches, strict=True)]


@pytest.mark.parametrize(
    ("workers", "context", "persistent"),
    [(0, None, False), (2, "fork", False), (2, "fork", True), (2, "spawn", True)],
)
def test_transforms_of_one_generator_draw_from_one_stream(workers, context, persistent):
    kinds = [TwoViews]
    if context != "spawn":
        kinds += [
            lambda: TwoViews(of=copy.deepcopy),
            lambda: TwoViews(of=lambda views: pickle.loads(pickle.dumps(views))),
            lambda: TwoViews(of=lambda views: [views[0], copy.copy(views[0])]),
        ]
    results = [drawn_twice(make(), workers, context, persistent) for make in kinds]
    for drawn in results:
        assert len(torch.cat(drawn).unique(dim=0)) == 4 * N  # no draw comes twice
        assert all(map(torch.equal, drawn, results[0]))


def test_generators_that_were_seeded_alike_stay_two():
    first, second = drawn_twice(TwoViews((7, 7)), 2, "fork")
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) == 2 * N


def test_a_generator_that_is_exchanged_or_gone_is_forgotten(monkeypatch):
    worker = SimpleNamespace(seed=11)
    monkeypatch.setattr("ola_augment.transforms.drawing.get_worker_info", lambda: worker)
    data, held = TwoViews(), len(_SHARED)
    before = data[0]
    data.views[0].generator = torch.Generator().manual_seed(7)
    assert torch.equal(data[0][0], before[0])
    assert len(_SHARED) == held + 2
    del data
    gc.collect()
    assert len(_SHARED) == held


def test_policies_share_their_logits_and_copies_do_not():
    policy = OLAPolicy()
    assert all(logits.is_shared() for logits in policy.named_logits().values())
    assert isinstance(PolicyTransform(policy).policy, OLAPolicy)
