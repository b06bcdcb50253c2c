"""Learners, engines and actions that are copied, pickled and sent to other processes."""

import copy
import io
import os
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from loops import learner_of, loader, logits, loss_of, network, optimizer_of, plain_loop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ola_augment import Actions, OLAAugment, OLALearner, OLAPolicy
from ola_augment import logits as logits_module

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "to another process": lambda value: pickle.loads(bytes(ForkingPickler.dumps(value))),
}
BATCHES = list(loader(16))

pytestmark = pytest.mark.filterwarnings("ignore:.*pairs of steps are too few")


def recommended(model):
    augment = OLAAugment("rand_augment", strength=1.0)
    held_out = DataLoader([(x.float() / 255, y) for x, y in loader(8)], batch_size=None)
    return OLALearner.recommended(model, augment, held_out, pairs=8)


def steps(learner, model, count=2):
    for index, (images, targets) in enumerate(BATCHES * count):
        with learner.augmented_step() if index % 2 == 0 else learner.plain_step() as step:
            seen = learner.augment(images) if index % 2 == 0 else images
            loss_of(model, seen, targets).backward()
            step.accuracy = 0.95
        model.zero_grad()


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("make", [learner_of, recommended])
def test_a_copied_learner_learns_as_the_first_one_does(way, make):
    """With a model that holds it, as weight averaging and spawned processes copy it."""
    holder = nn.Module()
    holder.network = network()
    holder.learner = make(holder.network)
    steps(holder.learner, holder.network)
    twin = COPIES[way](holder)
    assert twin.learner.pairs == holder.learner.pairs == 4
    twin.learner.check_model(twin.network)
    for one in (holder, twin):
        torch.manual_seed(7)
        steps(one.learner, one.network)
    assert torch.equal(logits(holder.learner), logits(twin.learner))
    assert twin.learner.pairs == 8
    assert not twin.learner.skipped
    before = logits(holder.learner)
    with torch.no_grad():
        twin.learner.policy.keep_logits.add_(1)
    # Only what goes to another process shares its memory with it.
    assert torch.equal(logits(holder.learner), before) == (way != "to another process")


@pytest.mark.parametrize("way", COPIES)
def test_a_pair_that_waits_is_refused_by_name(way):
    model = network()
    learner = learner_of(model)
    images, targets = BATCHES[0]
    with learner.augmented_step():
        loss_of(model, learner.augment(images), targets).backward()
        with pytest.raises(RuntimeError, match="a pair is under way"):
            COPIES[way](learner)
    with pytest.raises(RuntimeError, match=r"a pair is under way.*drop"):
        COPIES[way](learner)
    learner.drop()
    assert COPIES[way](learner).pairs == 0


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("size", [0, 1, 7])
def test_actions_travel_in_one_storage(way, size):
    actions = OLAPolicy("rand_augment").double().sample(size)
    found = COPIES[way](actions)
    assert isinstance(found, Actions)
    for name, field in actions._asdict().items():
        value = getattr(found, name)
        assert value.dtype == field.dtype
        assert torch.equal(value, field)
    assert len({field.untyped_storage().data_ptr() for field in found}) == 1
    one = COPIES[way](actions.select(0)) if size else None
    assert one is None or torch.equal(one.ops, actions.ops[0])


class Augmented(Dataset):
    def __init__(self):
        self.augment = OLAAugment("rand_augment")

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.augment(torch.zeros(3, 8, 8, dtype=torch.uint8))
        return index, self.augment.last_actions


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files by /proc")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kept_actions_of_workers_keep_one_file_a_batch():
    before = len(os.listdir("/proc/self/fd"))
    kept = [actions for _, actions in DataLoader(Augmented(), 4, num_workers=1)]
    assert len(kept) == 16
    assert len(os.listdir("/proc/self/fd")) - before < 40


def test_open_files_that_run_out_are_told_before_they_have(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (os.dup(2) + 3, 0))
    with pytest.warns(UserWarning, match=r"files that this process may have are open.*ulimit"):
        OLAPolicy("rand_augment")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**6, 0))
    OLAPolicy("rand_augment")


def test_logits_that_are_shared_stay_where_they_are():
    """A second share_memory_() would move them under the strategy "file_system"."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        policy = OLAPolicy("rand_augment")
        sent = pickle.loads(bytes(ForkingPickler.dumps(policy)))
        with torch.no_grad():
            policy.keep_logits.fill_(3)
        assert (sent.keep_logits == 3).all()
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def test_a_copy_in_a_process_that_others_started_says_that_it_stays_as_it_is(monkeypatch):
    """As grain's and Ray Data's: no worker of torch, and the policy came by a plain pickle."""
    augment = OLAAugment("rand_augment")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(augment.policy, "_process", os.getpid() + 1)
    monkeypatch.setattr(logits_module.multiprocessing, "parent_process", lambda: object())
    stored = pickle.dumps(augment)
    with pytest.warns(UserWarning, match=r"copied from another process.*freeze"):
        pickle.loads(stored).augment(images)
    learner = OLALearner(network(), pickle.loads(stored))  # it learns here
    learner.augment(images)
    pickle.loads(stored).freeze().augment(images)
    monkeypatch.undo()
    pickle.loads(stored).augment(images)


def test_pairs_that_teach_nothing_are_told_once_with_their_cause():
    def told(run):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        return [str(warning.message) for warning in caught]

    def only_augmented():
        for images, targets in BATCHES * 6:
            with learner.augmented_step():
                loss_of(model, learner.augment(images), targets).backward()

    model = network()
    learner = learner_of(model)
    [message] = told(only_augmented)
    assert "10 pairs in a row taught the policy nothing (no second half)" in message
    assert learner.skipped == {"no second half": 23}
    assert learner.pairs == 0

    def ones():
        plain_loop(model, learner, [(x[:1], y[:1]) for x, y in BATCHES * 6])

    learner = learner_of(model)
    [message] = told(ones)
    assert "(one example)" in message
    assert learner.skipped == {"one example": 12}
    assert not logits(learner).any()

    def not_finite():
        for index, (images, targets) in enumerate(BATCHES * 6):
            with learner.augmented_step() if index % 2 == 0 else learner.plain_step():
                seen = learner.augment(images) if index % 2 == 0 else images
                factor = float("nan") if index % 2 else 1.0
                (factor * loss_of(model, seen, targets)).backward()
            model.zero_grad()

    learner = learner_of(model)
    [message] = told(not_finite)
    assert "(not finite)" in message
    assert learner.skipped == {"not finite": 12}
    learner.load_state_dict(learner.state_dict())
    assert learner.skipped == {"not finite": 12}


def test_a_loss_that_is_asked_for_again_is_no_pair_of_its_own():
    model = network()
    learner = learner_of(model)
    optimizer = optimizer_of(model)
    for index, (images, targets) in enumerate(BATCHES * 2):
        for _ in range(2):  # as an optimizer with a closure does
            optimizer.zero_grad()
            with learner.augmented_step() if index % 2 == 0 else learner.plain_step():
                seen = learner.augment(images) if index % 2 == 0 else images
                loss_of(model, seen, targets).backward()
        optimizer.step()
    assert learner.pairs == 4
    assert logits(learner).any()


@pytest.mark.parametrize("batches", [[3, 2], [1, 4], [2, 2]])
def test_halves_of_any_number_of_micro_batches_end_with_the_last(batches):
    model = network()
    learner = learner_of(model)
    taught = []
    for half, count in enumerate(batches * 2):
        for index in range(count):
            images, targets = BATCHES[index % 4]
            last = index + 1 == count
            block = learner.augmented_step if half % 2 == 0 else learner.plain_step
            with block(last=last) as step:
                seen = learner.augment(images) if half % 2 == 0 else images
                (loss_of(model, seen, targets) / 4).backward()
            taught.append(step.stats is not None)
        model.zero_grad()
    assert learner.pairs == 2
    assert not learner.skipped
    assert sum(taught) == 2
    assert taught[-1]


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_a_distributed_checkpoint_that_leaves_keys_out_is_refused_and_bytes_are_whole(tmp_path):
    """It loads into the keys of a new learner, which has no moments and no mean yet."""
    from torch.distributed import checkpoint

    def make():
        return learner_of(network(), reference=list(loader(8)))

    model = network()
    learner = learner_of(model, reference=list(loader(8)))
    steps(learner, model)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    saved = {"plain": learner.state_dict(), "whole": file.getvalue()}
    checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    new = make()
    state = {"plain": new.state_dict(), "whole": b""}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=r"entries of .*store the state as bytes"):
        new.load_state_dict(state["plain"])
    assert not logits(new).any()
    new.load_state_dict(torch.load(io.BytesIO(state["whole"]), weights_only=True))
    first, second = learner.state_dict(), new.state_dict()
    for name, part in first["held_out"]["mean"].items():
        assert torch.equal(part, second["held_out"]["mean"][name])
    moments = second["updater"]["optimizer"]["state"]
    for index, entry in first["updater"]["optimizer"]["state"].items():
        assert torch.equal(entry["exp_avg"], moments[index]["exp_avg"])
