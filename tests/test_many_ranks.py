"""Many ranks learn one policy, as one process does: each draws, all update once.

What the ranks return is gathered once for all tests.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
from loops import dataset, learner_of, logits, loss_of, network, optimizer_of, plain_loop
from ranks import run_checks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from ola_augment import GARUpdater, OLAAugment, OLALearner
from ola_augment.training import SplitBatchSampler, SplitPolicy, Thermostat, ValueUpdater, ranks
from ola_augment.training.everyone import Everyone
from ola_augment.training.held_out import HeldOut
from ola_augment.training.rejoin import Rejoin

RANKS = 2


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loader(rank, size=32):
    sampler = DistributedSampler(dataset(size), dist.get_world_size(), rank, shuffle=False)
    return DataLoader(dataset(size), batch_size=4, sampler=sampler)


def trained(rank, **options):
    model = DistributedDataParallel(network(), **options)
    learner = learner_of(model, seed=rank)
    plain_loop(model, learner, list(loader(rank)))
    assert not learner.skipped
    return {"weights": weights(model), "logits": logits(learner)}


def as_always(rank, given):
    """Without a word of torch's about what it will give up."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return trained(rank)


def static_graph(rank, given):
    return trained(rank, static_graph=True)


def unused_are_found(rank, given):
    return trained(rank, find_unused_parameters=True)


def started_after_the_policy_was_made(rank, given):
    """The policies came in shared memory; every update and every move counts once."""
    augment, measured = given["learned"], given["steered"]
    updater = GARUpdater(augment.policy, lr=0.03)
    actions = augment.policy.sample(8)
    updater.step(actions, torch.arange(8.0))
    moved = augment.policy.keep_logits.detach().abs().max()
    thermostat = Thermostat(measured.policy, up=0.5, smoothing=0.0)
    thermostat.step(1.0)
    strength = measured.policy.strength
    dist.barrier()  # nobody writes to anybody else's meanwhile
    assert measured.policy.strength == strength
    ValueUpdater(given["valued"].policy).step(
        given["valued"].policy.sample(8), torch.arange(8.0), torch.ones(8)
    )
    dist.barrier()
    return {
        "moved": moved,
        "strength": torch.tensor(strength),
        "values": given["valued"].policy.keep_logits.detach().clone(),
        "logits": torch.cat([v.detach().flatten() for v in augment.policy.named_logits().values()]),
    }


def draws(rank, given):
    """All ranks are seeded alike."""
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    own, common, alike = OLAAugment(generator=generator), OLAAugment(), OLAAugment()
    alike.rank = 0
    found = {"generator": own.augment(images)[1].ops}
    for name in ("first", "again"):
        torch.manual_seed(0)
        found[name] = common.augment(images)[1].ops
        found[f"{name} next"] = common.augment(images)[1].ops
    torch.manual_seed(0)
    found["one image"] = torch.stack([common.augment(images[0])[1].ops for _ in range(16)])
    torch.manual_seed(0)
    found["alike"] = alike.augment(images)[1].ops
    samples = DataLoader(dataset(16), 16, num_workers=1, collate_fn=common.collate)
    torch.manual_seed(0)
    [(_, _, actions)] = list(samples)
    found["worker"] = actions.ops
    torch.manual_seed(0)
    splits = SplitBatchSampler(SplitPolicy(2), [range(50), range(50, 100)], 16, 1)
    found["splits"] = torch.tensor(next(iter(splits)))
    return found


def one_example_of_each_rank_is_enough(rank, given):
    model = DistributedDataParallel(network())
    learner = learner_of(model)
    plain_loop(model, learner, [(x[:1], y[:1]) for x, y in loader(rank)])
    return {"logits": logits(learner), "skipped": torch.tensor(learner.skipped.total())}


def inside_join(rank, given):
    model = DistributedDataParallel(network())
    learner = learner_of(model)
    try:
        with model.join():
            plain_loop(model, learner, list(loader(rank, 16)))
    except RuntimeError as error:
        return {"said": str(error)}


def a_group_of_one_kind_of_device(rank, given):
    """What a group cannot reduce where it lies goes to a device that it can."""
    asked = []
    cpu = torch.device("cpu")
    original, ranks.dist.get_backend_config = ranks.dist.get_backend_config, lambda: "meta:gloo"
    torch.get_device_module, module = (
        lambda kind: asked.append(kind) or Device,
        (torch.get_device_module),
    )
    try:
        reducible = ranks._reducible(cpu)
        ranks.dist.get_backend_config = lambda: "cpu:gloo,cuda:nccl"
        here = ranks._reducible(cpu)
    finally:
        ranks.dist.get_backend_config, torch.get_device_module = original, module
    return {"types": [reducible.type, here.type, *asked]}


GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SENDING = ("all_reduce", "all_gather", "broadcast", "reduce", GATHER)


def messages_of_pairs(rank, given):
    """What the policy adds to DDP's own reductions, which are not counted here."""
    sent, originals = [], {name: getattr(dist, name) for name in SENDING}

    def counted(name):
        def send(*arguments, **options):
            sent.append(name)
            return originals[name](*arguments, **options)

        return send

    def learners():
        held_out = list(loader(rank, 16))
        yield "next", learner_of(model(), learn_every=2)
        yield "held out", learner_of(model(), reference=held_out, learn_every=2)
        augment = OLAAugment("rand_augment", strength=1.0)
        given = OLALearner.recommended(model(), augment, held_out, pairs=2000)
        given.learn_every = 2
        yield "recommended", given

    def model():
        return DistributedDataParallel(network())

    found = {}
    for name, learner in learners():
        counts = []
        for way in SENDING:
            setattr(dist, way, counted(way))
        try:
            for images, targets in list(loader(rank))[:4]:
                sent.clear()
                plain_loop(learner._wrapper, learner, [(images, targets)] * 2)
                counts.append(len(sent))
        finally:
            for way, original in originals.items():
                setattr(dist, way, original)
        found[name] = torch.tensor(counts)
    return found


def examples_of_all_ranks(rank, given):
    """Each rank has all of them, however many are whose, and learns as one process would."""
    sample = torch.Generator().manual_seed(0)
    augment, alone = OLAAugment(strength=1.0), OLAAugment(strength=1.0)
    whole = augment.policy.sample(12, sample)
    signal = torch.randn(12, generator=sample), torch.rand(12, generator=sample)
    everyone, cpu = Everyone(), torch.device("cpu")
    for border in (5, 9, 0):
        own = slice(border) if rank == 0 else slice(border, None)
        parts = [whole.select(own)], tuple(part[own] for part in signal)
        found = everyone.gather(*parts, cpu)
        assert (everyone.bad, everyone.odd, everyone.examples) == (False, False, 12)
        for one, expected in zip((*found[0], *found[1]), (*whole, *signal), strict=True):
            assert one.dtype == expected.dtype
            assert torch.equal(one, expected)
    updater, expected = ValueUpdater(augment.policy), ValueUpdater(alone.policy)
    with ranks.alike():
        updater.step(found[0], *found[1])
        expected.step(whole, *signal)
    assert torch.equal(updater.state_dict()["moment"], expected.state_dict()["moment"])
    assert everyone.gather([whole], None if rank else signal, cpu) is None
    assert everyone.bad
    assert everyone.gather([whole], signal if rank else (signal[0][:3], signal[1]), cpu) is None
    assert (everyone.bad, everyone.odd) == (False, True)
    return {"moment": updater.state_dict()["moment"]}


def held_out_of_ranks(rank, given):
    """Of 8 held-out and 24 training images on both ranks, by the way in which ranks hold them."""
    images, labels = torch.arange(1000.0, 1008.0)[:, None], torch.arange(8)

    class Varied(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return images[index] + 0.1 * rank, labels[index]

    def part(*bounds):
        return [(images[bounds[rank]], labels[bounds[rank]])]

    cases = {
        "the same": part(slice(8), slice(8)),
        "in another order": part(slice(8), torch.arange(8).flip(0)),
        "the same, looking another way": DataLoader(Varied(), 3),
        "halves": part(slice(4), slice(4, 8)),
        "parts": part(slice(6), slice(6, 8)),
    }
    joined = {}
    for name, batches in cases.items():
        rejoin, count = Rejoin(batches), 0
        for _ in range(32):
            _, targets = rejoin.mix((torch.zeros(10, 1), torch.full((10,), 99)), train_size=24)
            count += int((targets < 99).sum())
        joined[name] = torch.tensor(count)
    return joined


def held_out_gradient_of_ranks(rank, given):
    """The mean over the held-out examples of all ranks, and so is the loss."""
    images, labels = dataset(12)[:]
    own = slice(9) if rank == 0 else slice(9, 12)
    model = network()
    parts, whole = (HeldOut([(images[s], labels[s])], 0.0) for s in (own, slice(12)))
    found, expected = parts.gradients(model), whole.gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)

    def own_loss(model, images, labels):  # which has no outputs whose temperature could be found
        return images.float().mean() + next(model.parameters()).sum()

    parts = HeldOut([(images[own], labels[own])], 0.0, own_loss)
    parts._halves = ([], [(images[own], labels[own])])
    loss = parts.loss(model)
    assert loss == pytest.approx(float(own_loss(model, images, labels)))
    return {"gradient": found["0.weight"], "loss": torch.tensor(loss)}


class Device:
    @staticmethod
    def current_device():
        return 0


def recommended_by_loop(rank, given):
    model = DistributedDataParallel(network())
    augment = OLAAugment("rand_augment", strength=1.0)
    learner = OLALearner.recommended(model, augment, list(loader(rank, 16)), pairs=500)
    optimizer = optimizer_of(model)
    for index, (images, targets) in enumerate(loader(rank)):
        with learner.augmented_step() if index % 2 == 0 else learner.plain_step():
            seen = learner.augment(images) if index % 2 == 0 else images
            loss_of(model, seen, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(model), "moment": learner.updater.state_dict()["moment"]}


def recommended_by_lightning(rank, given):
    import test_integrations_lightning as case

    module = case.Module()
    augment = OLAAugment("rand_augment", strength=1.0)
    learner = OLALearner.recommended(module.network, augment, list(loader(rank, 16)), pairs=500)
    case.trainer(
        case.OLACallback(learner), devices=RANKS, strategy="ddp", use_distributed_sampler=False,
        gradient_clip_val=None,
    ).fit(module, loader(rank))  # fmt: skip
    assert learner.pairs == 2
    assert not learner.skipped
    return {"weights": weights(module), "moment": learner.updater.state_dict()["moment"]}


CHECKS = (
    as_always, static_graph, unused_are_found, started_after_the_policy_was_made, draws,
    one_example_of_each_rank_is_enough,
    messages_of_pairs, examples_of_all_ranks, a_group_of_one_kind_of_device,
    recommended_by_loop, recommended_by_lightning, held_out_of_ranks, held_out_gradient_of_ranks,
    inside_join,  # the last one: whoever leaves a Join by an error may be out of step
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    policies = {
        "learned": OLAAugment("rand_augment"),
        "steered": OLAAugment(strength=1.0),
        "valued": OLAAugment(strength=1.0),
    }
    results = run_checks(CHECKS, tmp_path_factory.mktemp("ranks"), policies, RANKS)
    results["here"] = {name: augment.policy for name, augment in policies.items()}
    return results


def same(ranks):
    for name, value in ranks[0].items():
        for other in ranks[1:]:
            assert torch.equal(value, other[name]), name
    return ranks[0]


def whole(results):
    assert not any(isinstance(result, str) for result in results), results
    return results


@pytest.mark.parametrize("way", [static_graph, unused_are_found])
def test_every_form_of_ddp_trains_as_the_plain_one(found, way):
    expected = same(whole(found["as_always"]))
    assert expected["logits"].abs().max() > 0.05
    torch.testing.assert_close(same(whole(found[way.__name__])), expected)


def test_ranks_that_were_started_after_the_policy_was_made_update_it_once(found):
    first = same(whole(found["started_after_the_policy_was_made"]))
    assert first["moved"].item() == pytest.approx(0.03, rel=1e-3)
    assert first["strength"].item() == pytest.approx(1.5)
    assert first["values"].abs().max() > 0
    # Rank 0 writes to where its parent looks.
    assert torch.equal(found["here"]["valued"].keep_logits, first["values"])
    assert found["here"]["steered"].strength == pytest.approx(1.5)


def test_ranks_that_are_seeded_alike_draw_differently_and_repeat(found):
    first, second = whole(found["draws"])
    for name in ("generator", "first", "first next", "one image", "worker", "splits"):
        assert not torch.equal(first[name], second[name]), name
    for rank in (first, second):
        assert torch.equal(rank["first"], rank["again"])
        assert torch.equal(rank["first next"], rank["again next"])
        assert not torch.equal(rank["first"], rank["first next"])
    assert torch.equal(first["alike"], second["alike"])
    torch.manual_seed(0)
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    assert torch.equal(first["first"], OLAAugment().augment(images)[1].ops)  # as one process


def test_the_recommended_learner_is_one_on_all_ranks_and_in_all_loops(found):
    pytest.importorskip("lightning")
    for way in ("recommended_by_loop", "recommended_by_lightning"):
        assert same(whole(found[way]))["moment"].any()


def test_three_ranks_learn_one_policy(tmp_path):
    results = run_checks((as_always, recommended_by_loop), tmp_path, ranks=3)
    assert same(whole(results["as_always"]))["logits"].abs().max() > 0.05
    assert same(whole(results["recommended_by_loop"]))["moment"].any()


def test_join_is_refused_by_name(found):
    for rank in whole(found["inside_join"]):
        assert "cannot learn inside Join" in rank["said"]


def test_what_a_pair_sends_does_not_grow_with_the_model(found):
    """The first message finds out how large the next ones are."""
    first = same(whole(found["messages_of_pairs"]))
    assert first["next"].tolist() == [2, 0, 1, 0]
    for name in ("held out", "recommended"):  # and the held-out gradient, in one
        assert first[name].tolist() == [3, 0, 2, 0]


def test_each_rank_learns_from_the_examples_of_all(found):
    assert same(whole(found["examples_of_all_ranks"]))["moment"].any()


def test_held_out_images_join_as_often_whichever_rank_holds_them(found):
    """8 of 32 images are held-out ones: a quarter of what both ranks train on."""
    ranks = whole(found["held_out_of_ranks"])
    for name, count in ranks[0].items():
        expected = [120, 40] if name == "parts" else [80, 80]
        assert [int(count), int(ranks[1][name])] == expected, name


def test_held_out_examples_of_all_ranks_count_alike(found):
    assert same(whole(found["held_out_gradient_of_ranks"]))["gradient"].any()


def test_sums_are_made_where_the_group_can_make_them(found):
    for rank in whole(found["a_group_of_one_kind_of_device"]):
        assert rank["types"] == ["meta", "cpu", "meta"]


def test_one_example_of_each_rank_makes_a_batch(found):
    first = same(whole(found["one_example_of_each_rank_is_enough"]))
    assert first["skipped"] == 0
    assert first["logits"].any()


def test_a_process_that_a_rank_started_draws_for_that_rank(monkeypatch):
    """Spawned DataLoader workers know nothing of the process group."""
    import pickle

    from ola_augment.transforms import drawing

    augment = OLAAugment()
    monkeypatch.setattr(drawing, "rank_here", lambda: 3)
    stored = pickle.dumps(augment)
    monkeypatch.setattr(drawing, "get_spawning_popen", lambda: object())
    spawned = pickle.dumps(augment)
    monkeypatch.undo()
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)

    def drawn(transform, rank=None):
        transform.rank = rank
        torch.manual_seed(0)
        return transform.augment(images)[1].ops

    assert torch.equal(drawn(pickle.loads(spawned)), drawn(augment, rank=3))
    assert torch.equal(drawn(pickle.loads(stored)), drawn(augment, rank=0))
    assert not torch.equal(drawn(augment, rank=3), drawn(augment, rank=0))


def test_a_learner_of_one_process_leaves_its_policy_where_it_is():
    augment = OLAAugment("rand_augment")
    before = augment.policy.keep_logits.data_ptr()
    OLALearner(network(), augment)
    assert augment.policy.keep_logits.data_ptr() == before
