"""OLALearner in a plain loop: every reference, micro-batches, failures, its state."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ola_augment import (
    GARUpdater,
    NSLRUpdater,
    OLAAugment,
    OLALearner,
    OLAPolicy,
    Thermostat,
    UniformAugment,
    ValueUpdater,
)
from ola_augment.alignment import BackPACKAlignment, DirectionalAlignment, GradientAlignment
from ola_augment.training import cosine_reward

B = 8


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed, size=B):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (size,), generator=generator)


def transform():
    return OLAAugment("rand_augment", max_ops=2, generator=torch.Generator().manual_seed(1))


def loss_of(model, images, targets):
    images = images if images.is_floating_point() else images.float() / 255
    return F.cross_entropy(model(images), targets)


def gradients(model, images, targets):
    """(B, number of parameters), one by one."""
    rows = []
    for image, target in zip(images, targets, strict=True):
        loss = loss_of(model, image[None], target[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


class Spy(GARUpdater):
    """Keeps the signals it was given."""

    def __init__(self, policy, **options):
        super().__init__(policy, **options)
        self.seen = []

    def step(self, actions, alignments):
        self.seen.append((actions, alignments.clone()))
        return super().step(actions, alignments)


class Loop:
    """A user's own loop of pairs."""

    def __init__(self, **options):
        self.model = network()
        self.augment = transform()
        self.updater = Spy(self.augment.policy, lr=0.1)
        self.learner = OLALearner(self.model, self.augment, updater=self.updater, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def augmented(self, index):
        with self.learner.augmented_step() as step:
            images, targets = batch(2 * index)
            loss_of(self.model, self.learner.augment(images), targets).backward()
        self.step()
        return step

    def plain(self, index):
        with self.learner.plain_step() as step:
            loss = loss_of(self.model, *batch(2 * index + 1))
            loss.backward()
            step.loss = loss
        self.step()
        return step

    def pair(self, index):
        self.augmented(index)
        return self.plain(index)

    def halves(self):
        """The steps of six pairs."""
        return [partial(half, i) for i in range(6) for half in (self.augmented, self.plain)]

    def logits(self):
        return [logits.detach().clone() for logits in self.augment.policy.named_logits().values()]


def expected_of_first_pair(reference, cosine):
    """From per-example gradients."""
    model = network()
    images, targets = batch(0)
    augmented, _ = transform().augment(images)
    rows = gradients(model, augmented, targets)
    g = gradients(model, *batch(1)).mean(0)
    if reference == "next":
        theta = nn.utils.parameters_to_vector(model.parameters()) - 0.1 * rows.mean(0)
        nn.utils.vector_to_parameters(theta.detach(), model.parameters())
        g = gradients(model, *batch(1)).mean(0)
    alignments = rows @ g / B
    return F.cosine_similarity(rows, g[None]) if cosine else alignments


@pytest.mark.parametrize("cosine", [False, True])
def test_the_reference_is_the_plain_batch_after_the_step(cosine):
    loop = Loop(cosine=cosine)
    assert loop.pair(0).stats.stepped
    [(_, found)] = loop.updater.seen
    torch.testing.assert_close(found, expected_of_first_pair("next", cosine), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_reference_is_held_out_batches_in_turn(cosine):
    loop = Loop(cosine=cosine, reference=[batch(1), batch(7)])
    assert loop.pair(0).stats is None  # the augmented step has it
    [(_, found)] = loop.updater.seen
    expected = expected_of_first_pair("held out", cosine)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for index in range(1, 4):
        loop.pair(index)
    assert len(loop.updater.seen) == 4


@pytest.mark.parametrize("smoothing", [0.0, 0.75])
def test_held_out_gradients_are_smoothed(smoothing):
    loop = Loop(reference=[batch(5), batch(6)], smoothing=smoothing)
    mean = None
    for index in range(4):
        new = gradients(loop.model, *batch(5 + index % 2)).mean(0)
        mean = new if mean is None else smoothing * mean + (1 - smoothing) * new
        rows = gradients(loop.model, *with_actions(loop, index))
        loop.pair(index)
        torch.testing.assert_close(loop.updater.seen[-1][1], rows @ mean / B, rtol=1e-4, atol=1e-6)


def with_actions(loop, index):
    """What the loop's next augmented step will train on."""
    state = loop.augment.generator.get_state()
    images, targets = batch(2 * index)
    images, _ = loop.augment.augment(images)
    loop.augment.generator.set_state(state)
    return images, targets


def test_a_held_out_gradient_that_is_not_finite_stays_out_of_the_mean():
    bad = batch(6)[0].float() * torch.nan, batch(6)[1]
    loop = Loop(reference=[batch(5), bad, batch(5)])
    for index in range(3):
        loop.pair(index)
    assert loop.learner.skipped.total() == 1
    assert len(loop.updater.seen) == 2
    assert all(torch.isfinite(found).all() for _, found in loop.updater.seen)


@pytest.mark.parametrize("smoothing", [1.0, -0.1, float("nan")])
def test_smoothing_is_checked(smoothing):
    with pytest.raises(ValueError, match="smoothing must lie in"):
        Loop(reference=[batch(5)], smoothing=smoothing)


def test_learning_ends_after_learn_pairs_and_costs_nothing_then():
    loop = Loop(reference=[batch(9)], learn_every=2, learn_pairs=4)
    for index in range(8):
        loop.pair(index)
    assert len(loop.updater.seen) == 2
    assert not loop.learner.learns
    assert loop.learner.pairs == 8
    with pytest.raises(ValueError, match="learn_pairs"):
        Loop(learn_pairs=-1)


def test_held_out_batches_leave_buffers_and_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    learner = OLALearner(model, transform(), reference=[batch(5)])
    with pytest.raises(RuntimeError, match="nothing was augmented"), learner.augmented_step():
        loss_of(model, *batch(0)).backward()
    assert model[2].num_batches_tracked == 1


def test_the_reference_is_the_plain_batch_before_the_step():
    loop = Loop(reference="current")
    with loop.learner.plain_step() as step:
        loss_of(loop.model, *batch(1)).backward()
    assert step.stats is None
    with loop.learner.augmented_step() as step:
        images, targets = batch(0)
        loss_of(loop.model, loop.learner.augment(images), targets).backward()
    assert step.stats.stepped
    assert loop.learner.pairs == 1
    [(_, found)] = loop.updater.seen
    expected = expected_of_first_pair("current", cosine=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reference", ["next", "held out", "current"])
def test_micro_batches_make_one_half(reference):
    held_out = [batch(1)]
    whole = Loop(reference=held_out if reference == "held out" else reference)
    parts = Loop(reference=held_out if reference == "held out" else reference, micro_batches=2)
    drawn, _ = transform().augment(batch(0)[0])
    _, actions = transform().augment(batch(0)[0])
    for loop, count in ((whole, 1), (parts, 2)):
        size = B // count
        rows = [slice(i * size, (i + 1) * size) for i in range(count)]

        def augmented(loop=loop, rows=rows, count=count):
            for part in rows:
                with loop.learner.augmented_step(actions=actions.select(part)):
                    (loss_of(loop.model, drawn[part], batch(0)[1][part]) / count).backward()
            loop.step()

        def plain(loop=loop, rows=rows, count=count):
            images, targets = batch(1)
            for part in rows:
                with loop.learner.plain_step():
                    (loss_of(loop.model, images[part], targets[part]) / count).backward()
            if reference != "current":
                loop.step()

        for half in (plain, augmented) if reference == "current" else (augmented, plain):
            half()
    assert whole.learner.pairs == parts.learner.pairs == 1
    torch.testing.assert_close(whole.updater.seen[0][1], parts.updater.seen[0][1])


def test_every_second_pair_teaches_and_the_others_capture_nothing(monkeypatch):
    captures, original = [], GradientAlignment.capture

    def counted(engine, **options):
        captures.append(options)
        return original(engine, **options)

    monkeypatch.setattr(GradientAlignment, "capture", counted)
    loop = Loop(learn_every=2)
    assert [loop.pair(i).stats is not None for i in range(4)] == [True, False, True, False]
    assert loop.learner.skipped.total() == 0
    assert len(captures) == 2


def test_a_half_that_is_run_twice_gives_up_the_pair_before():
    loop = Loop()
    loop.augmented(0)
    images, targets = batch(2)
    images = loop.learner.augment(images)  # of the second, before its block
    with loop.learner.augmented_step():
        loss_of(loop.model, images, targets).backward()
    loop.step()
    assert loop.plain(1).stats.stepped
    assert (loop.learner.pairs, loop.learner.skipped.total()) == (1, 1)
    [(actions, alignments)] = loop.updater.seen
    assert len(alignments) == actions.batch_size == B
    other = transform()
    other.augment(batch(0)[0])
    assert torch.equal(actions.ops, other.augment(batch(2)[0])[1].ops)

    loop = Loop(reference="current")
    for index in range(2):
        loop.optimizer.zero_grad()
        with loop.learner.plain_step():
            loss_of(loop.model, *batch(index)).backward()
    assert loop.augmented(0).stats.stepped
    assert (loop.learner.pairs, loop.learner.skipped.total()) == (1, 1)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_micro_batch_that_is_not_finite_costs_the_pairs_reward(bad):
    loop = Loop(reference=[batch(1)], micro_batches=2)
    for pair in range(2):
        for index in range(2):
            factor = torch.nan if (pair, index) == (0, bad) else 1.0
            with loop.learner.augmented_step() as step:
                images, targets = batch(index)
                images = loop.learner.augment(images)
                (factor * loss_of(loop.model, images, targets)).backward()
            loop.optimizer.zero_grad()
        assert (step.stats is None) == (pair == 0)
        for index in range(2):
            with loop.learner.plain_step():
                loss_of(loop.model, *batch(index)).backward()
    assert (loop.learner.pairs, loop.learner.skipped.total()) == (2, 1)
    [(actions, alignments)] = loop.updater.seen
    assert actions.batch_size == len(alignments) == 2 * B


def test_defaults_of_the_updater():
    assert OLALearner(network(), transform()).updater.optimizer.param_groups[0]["lr"] == 0.03
    assert OLALearner(network(), transform(), 0.2).updater.optimizer.param_groups[0]["lr"] == 0.2


def test_an_updater_of_ones_own_gets_alignments_alone():
    class Recorder:
        per_example = True

        def __init__(self, policy):
            self.policy = policy

        def step(self, actions, *signal):
            self.seen = actions, *signal

    loop = Loop()
    updater = Recorder(loop.augment.policy)
    loop.learner = OLALearner(loop.model, loop.augment, updater=updater)
    loop.pair(0)
    actions, alignments = updater.seen
    assert actions.batch_size == B
    expected = expected_of_first_pair("next", cosine=False)
    torch.testing.assert_close(alignments, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("known", [False, True])
def test_cosines_of_unused_and_frozen_parameters_and_of_no_gradient(known):
    """They are those over what is trained; an example without a gradient has 0."""
    model = network()
    model[1].bias.requires_grad_(False)
    model[1].bias.grad = torch.full((8,), 1e3)  # left from before it was frozen
    model.unused = nn.Parameter(torch.ones(3))
    augment = transform()
    updater = Spy(augment.policy)
    learner = OLALearner(
        model, augment, updater=updater, cosine=True, reference=[batch(1)] if known else "next"
    )
    weights = torch.ones(B).index_fill(0, torch.tensor([2]), 0)
    with learner.augmented_step():
        images, targets = batch(0)
        images = learner.augment(images)
        losses = F.cross_entropy(model(images.float() / 255), targets, reduction="none")
        (weights * losses).mean().backward()
    model[1].weight.grad = model[3].weight.grad = model[3].bias.grad = None
    with learner.plain_step():
        loss_of(model, *batch(1)).backward()

    def trained(rows):  # the rows of `gradients` have the frozen bias after the first weight
        first = model[1].weight.numel()
        return torch.cat([rows[:, :first], rows[:, first + 8 :]], 1)

    rows = trained(gradients(network(), images, targets)) * weights[:, None]
    g = trained(gradients(network(), *batch(1))).mean(0)
    [(_, found)] = updater.seen
    torch.testing.assert_close(found, F.cosine_similarity(rows, g[None]), rtol=1e-4, atol=1e-6)
    assert found[2] == 0


def test_other_engines_and_the_next_loss():
    model, augment = network(), transform()

    def losses(model, images, targets):
        return F.cross_entropy(model(images.float() / 255), targets, reduction="none")

    engine = DirectionalAlignment(model, losses, method="jvp")
    updater = Spy(augment.policy)
    learner = OLALearner(model, augment, updater=updater, engine=engine)
    images, targets = batch(0)
    with learner.augmented_step(learner.augment(images), targets) as step:
        step.losses.mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    with learner.plain_step():
        loss_of(model, *batch(1)).backward()
    expected = B * expected_of_first_pair("next", cosine=False)
    torch.testing.assert_close(updater.seen[0][1], expected, rtol=1e-4, atol=1e-6)

    loop = Loop()
    loop.learner = OLALearner(
        loop.model, loop.augment, updater=NSLRUpdater(loop.augment.policy, accumulate=2)
    )
    assert [loop.pair(i).stats.stepped for i in range(2)] == [False, True]


def test_held_out_batches_of_an_engine_that_aligns_afterwards():
    """Its capture takes no gradients."""
    model, augment = network(), transform()

    def losses(model, images, targets):
        return F.cross_entropy(model(images.float() / 255), targets, reduction="none")

    updater = Spy(augment.policy)
    engine = DirectionalAlignment(model, losses, method="jvp")
    learner = OLALearner(model, augment, updater=updater, engine=engine, reference=[batch(1)])
    images, targets = batch(0)
    with learner.augmented_step(learner.augment(images), targets) as step:
        step.losses.mean().backward()
    expected = B * expected_of_first_pair("held out", cosine=False)
    torch.testing.assert_close(updater.seen[0][1], expected, rtol=1e-4, atol=1e-6)
    with (
        pytest.raises(ValueError, match="DirectionalAlignment cannot take loss_scale=2"),
        learner.augmented_step(images, targets, loss_scale=2.0),
    ):
        pass


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_backpack_carries_the_same_pair():
    from backpack import extend

    model, augment = extend(network()), transform()
    updater = Spy(augment.policy)
    learner = OLALearner(model, augment, updater=updater, engine=BackPACKAlignment(model))
    with learner.augmented_step():
        loss_of(model, learner.augment(batch(0)[0]), batch(0)[1]).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    with learner.plain_step():
        loss_of(model, *batch(1)).backward()
    expected = expected_of_first_pair("next", cosine=False)
    torch.testing.assert_close(updater.seen[0][1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reference", ["next", "held out"])
def test_stopped_after_every_pair_and_resumed(reference):
    def make():
        held_out = [batch(90 + i) for i in range(3)]
        return Loop(reference="next" if reference == "next" else held_out)

    whole = make()
    for index in range(6):
        whole.pair(index)
    for stop in range(7):
        first, second = make(), make()
        for index in range(stop):
            first.pair(index)
        file = io.BytesIO()
        parts = {k: getattr(first, k).state_dict() for k in ("learner", "model", "optimizer")}
        torch.save(parts, file)
        file.seek(0)
        for name, state in torch.load(file, weights_only=True).items():
            getattr(second, name).load_state_dict(state)
        assert second.learner.state_dict()["pairs"] == stop  # and can be saved again at once
        for index in range(stop, 6):
            second.pair(index)
        assert all(map(torch.equal, whole.logits(), second.logits()))
        assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))


@pytest.mark.parametrize("options", [{"reference": "held out"}, {"learn_every": 3}])
def test_stopped_at_every_step_where_nothing_waits_and_resumed(options):
    def make():
        if "reference" in options:
            return Loop(reference=[batch(90 + i) for i in range(4)])
        return Loop(**options)

    whole = make()
    for half in whole.halves():
        half()
    refused = []
    for stop in range(13):
        first, second = make(), make()
        for half in first.halves()[:stop]:
            half()
        try:
            state = first.learner.state_dict()
        except RuntimeError:
            refused.append(stop)
            continue
        second.learner.load_state_dict(state)
        assert second.learner.state_dict()["half"] == state["half"]
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
        for half in second.halves()[stop:]:
            half()
        assert all(map(torch.equal, whole.logits(), second.logits())), stop
        assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))
        assert second.learner.pairs == 6
        assert second.learner.skipped.total() == 0
    assert refused == ([] if "reference" in options else [1, 7])  # a capture waits


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("reference", ["next", "current", "held out"])
def test_a_loss_scale_that_is_forgotten_changes_no_update(reference, cosine):
    """Normalised rewards lose every factor, also one that differs between halves and pairs."""

    def train(scales, told):
        loop = Loop(reference=[batch(1)] if reference == "held out" else reference, cosine=cosine)
        names = ["plain", "augmented"] if loop.learner.plain_first else ["augmented", "plain"]
        for index, (name, scale) in enumerate(zip(names * 3, scales, strict=True)):
            options = {"loss_scale": scale} if told else {}
            images, targets = batch(index)
            with getattr(loop.learner, f"{name}_step")(**options) as step:
                if name == "augmented":
                    images = loop.learner.augment(images)
                (scale * loss_of(loop.model, images, targets)).backward()
            if index % 2 or reference != "current":
                for parameter in loop.model.parameters():
                    parameter.grad /= scale
                loop.step()
            if step.stats is not None:
                last = step.stats
        assert loop.learner.pairs == 3
        return loop.logits(), last

    scales = [2.0**10, 2.0**10 if reference == "current" else 2.0**12, *[2.0**14] * 2, *[4.0] * 2]
    plain, stats = train([1.0] * 6, told=False)
    for told in (True, False):
        logits, scaled = train(scales, told)
        assert all(map(torch.equal, plain, logits))
        assert (scaled.reward_std == stats.reward_std) == (told or cosine)  # as it is reported


def test_half_a_pair_is_not_saved():
    loop = Loop()
    loop.augmented(0)
    with pytest.raises(RuntimeError, match="pair is under way"):
        loop.learner.state_dict()
    loop.learner.drop()
    assert loop.learner.state_dict()["pairs"] == 0


def test_a_state_that_does_not_fit_changes_nothing():
    loop = Loop()
    loop.pair(0)
    state = loop.learner.state_dict()
    before = loop.logits()
    others = [
        OLALearner(network(), OLAAugment("wide_long", max_ops=2)),
        OLALearner(network(), OLAAugment("rand_augment", max_ops=3)),
        OLALearner(network(), OLAAugment("rand_augment", max_ops=2)),
    ]
    augment = transform()
    others.append(OLALearner(network(), augment, updater=NSLRUpdater(augment.policy)))
    for other in others:
        with pytest.raises(ValueError, match=r"another|does not fit"):
            other.load_state_dict(state)
        assert not any(logits.any() for logits in other.policy.named_logits().values())
    moments = state["updater"]["optimizer"]["state"][0]
    damaged = [
        {},
        {**state, "version": 9},
        {**state, "pairs": -1},
        {**state, "half": "plain"},
        {**state, "generator": torch.zeros(3)},
        {**state, "policy": {}},
        {**state, "updater": {**state["updater"], "pending": 1}},
    ]
    for value in (torch.zeros(7), moments["exp_avg"] * float("nan")):
        optimizer = state["updater"]["optimizer"]
        broken = {**optimizer, "state": {**optimizer["state"], 0: {**moments, "exp_avg": value}}}
        damaged.append({**state, "updater": {**state["updater"], "optimizer": broken}})
    for bad in damaged:
        with pytest.raises(ValueError, match="state"):
            loop.learner.load_state_dict(bad)
        assert all(map(torch.equal, before, loop.logits()))
    loop.pair(1)


@pytest.mark.parametrize("where", ["augmented", "plain"])
def test_an_error_or_nan_costs_one_reward(where):
    loop = Loop()
    loop.pair(0)
    before = loop.logits()

    def poisoned(half):
        images, targets = batch(3)
        factor = float("nan") if half == where else 1.0
        with getattr(loop.learner, f"{half}_step")() as step:
            images = loop.learner.augment(images) if half == "augmented" else images
            (factor * loss_of(loop.model, images, targets)).backward()
        loop.optimizer.zero_grad()
        return step

    poisoned("augmented")
    assert poisoned("plain").stats is None
    assert loop.learner.skipped.total() == 1
    assert all(map(torch.equal, before, loop.logits()))

    def interrupt():
        with loop.learner.augmented_step():
            loop.learner.augment(batch(0)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert loop.pair(2).stats.stepped


def test_what_does_not_belong_together_is_refused_at_once():
    model, augment = network(), transform()
    for kind in (GARUpdater, NSLRUpdater):
        with pytest.raises(ValueError, match="OLAAugment has no logits"):
            kind(augment)
    with pytest.raises(ValueError, match="another policy"):
        OLALearner(model, augment, updater=GARUpdater(transform().policy))
    with pytest.raises(ValueError, match="model that is trained"):
        OLALearner(model, augment, engine=GradientAlignment(network()))
    with pytest.raises(ValueError, match="no logits"):
        OLALearner(model, UniformAugment())
    with pytest.raises(TypeError, match="PolicyTransform"):
        OLALearner(model, nn.Identity())
    with pytest.raises(ValueError, match="reference"):
        OLALearner(model, augment, reference="before")
    with pytest.raises(ValueError, match="iterator"):
        OLALearner(model, augment, reference=iter([batch(0)]))
    for name in ("learn_every", "micro_batches"):
        with pytest.raises(ValueError, match=name):
            OLALearner(model, augment, **{name: 0})
    engine = DirectionalAlignment(model, loss_of)
    with pytest.raises(ValueError, match="norms"):
        OLALearner(model, augment, cosine=True, engine=engine)
    for options in (
        {"cosine": True},
        {"reference": "current"},
        {"reference": [batch(0)]},
        {"engine": GradientAlignment(model)},
    ):
        with pytest.raises(ValueError, match="next loss"):
            OLALearner(model, augment, updater=NSLRUpdater(augment.policy), **options)
    learner = OLALearner(model, augment)
    learner.check_model(model)
    with pytest.raises(ValueError, match="model that is trained"):
        learner.check_model(network())


def test_the_updaters_reward_gets_the_norms_it_takes():
    seen = []

    def reward(alignments, norms):
        seen.append((alignments, norms))
        return cosine_reward(alignments, norms)

    model, augment = network(), transform()
    learner = OLALearner(model, augment, updater=GARUpdater(augment.policy, reward=reward))
    with learner.augmented_step():
        images, targets = batch(0)
        loss_of(model, learner.augment(images), targets).backward()
    model.zero_grad()
    with learner.plain_step() as step:
        loss_of(model, *batch(1)).backward()
    assert step.stats.stepped
    rows = gradients(network(), transform().augment(batch(0)[0])[0], targets)
    [(alignments, norms)] = seen
    torch.testing.assert_close(norms, rows.norm(dim=1) / B, rtol=1e-4, atol=1e-6)
    g = gradients(network(), *batch(1)).mean(0)
    torch.testing.assert_close(alignments, rows @ g / B, rtol=1e-4, atol=1e-6)
    engine = DirectionalAlignment(model, loss_of)
    with pytest.raises(ValueError, match="norms"):
        OLALearner(model, augment, engine=engine, updater=learner.updater)


class Steered:
    """A loop whose policy has a strength, values and a thermostat."""

    def __init__(self, learn_pairs=None, **options):
        self.model = network()
        self.augment = OLAAugment(
            "rand_augment", generator=torch.Generator().manual_seed(1), strength=1.0
        )
        self.thermostat = Thermostat(self.augment.policy, smoothing=0.0, lower_after=2, **options)
        self.learner = OLALearner(
            self.model,
            self.augment,
            reference=[batch(99)],
            thermostat=self.thermostat,
            learn_pairs=learn_pairs,
        )

    def pair(self, accuracy):
        with self.learner.augmented_step() as augmented:
            images, targets = batch(0)
            loss_of(self.model, self.learner.augment(images), targets).backward()
        with self.learner.plain_step() as step:
            loss_of(self.model, *batch(1)).backward()
            step.accuracy = accuracy
        return augmented


def test_a_policy_of_given_strength_learns_by_values_and_a_thermostat_steers_it():
    loop = Steered(up=0.5, down=0.25, most=2.0)
    assert isinstance(loop.learner.updater, ValueUpdater)
    strengths = []
    for accuracy in (0.1, 0.1, 0.1, 0.7, 0.95, 0.95, 0.95, 0.95, 0.2):
        assert loop.pair(accuracy).stats.stepped
        strengths.append(loop.augment.policy.strength)
    assert strengths == [1.0, 1.0, 0.75, 0.75, 1.25, 1.75, 2.0, 2.0, 1.75]
    assert loop.augment.policy.keep_logits.any()
    with pytest.raises(RuntimeError, match="accuracy"):
        loop.pair(None)


def test_it_explores_as_long_as_it_learns_and_then_draws_by_values():
    loop = Steered(learn_pairs=4)
    for pair in range(4):
        assert loop.learner.updater.explores
        assert not loop.augment.policy.keep_logits.any()
        assert not loop.pair(0.7).stats.stepped, pair
    logits = loop.augment.policy.keep_logits.detach().clone()
    assert logits.any()
    assert loop.pair(0.7).stats is None
    assert torch.equal(loop.augment.policy.keep_logits, logits)


def test_a_policy_that_was_frozen_while_it_explored_stays_as_it_is():
    loop = Steered(learn_pairs=2)
    loop.pair(0.9)
    strength = loop.augment.policy.strength
    loop.augment.freeze()
    loop.pair(1.0)
    assert not loop.augment.policy.keep_logits.any()
    assert loop.augment.policy.strength == strength


def test_the_recommended_setting():
    model, augment = network(), OLAAugment("rand_augment", strength=1.0)
    learner = OLALearner.recommended(model, augment, [batch(99)], pairs=3000)
    assert (learner.learn_pairs, learner.learn_every) == (500, 3)
    assert learner.updater.explores
    assert learner.updater.shrink
    assert (learner.trial.first, learner.trial.windows, learner.trial.last) == (500, 16, 1908)
    # No more is tried than would be chosen.
    assert learner.trial.strength == learner.trial.most == 2
    assert learner.rejoins
    with pytest.warns(UserWarning, match=r"1 pair of steps is too few .*480 are enough"):
        short = OLALearner.recommended(model, augment, [batch(99)], pairs=1)
    assert short.learn_pairs == 0
    own = OLALearner.recommended(model, augment, [batch(99)], pairs=500, target_domain=False)
    assert not own.learns
    assert own.trial.strength == 1
    for arguments, error, message in (
        ((augment, [batch(99)], 0), ValueError, "pairs must be"),
        ((augment, [batch(99)], 2.5), ValueError, "pairs must be"),
        ((transform(), [batch(99)], 900), ValueError, "learns its strength"),
        ((UniformAugment(), [batch(99)], 900), TypeError, "OLAPolicy"),
        ((augment.policy, [batch(99)], 9), TypeError, "PolicyTransform"),
        ((augment, iter([batch(99)]), 900), ValueError, "iterator"),
    ):
        with pytest.raises(error, match=message):
            OLALearner.recommended(model, *arguments)


def test_the_state_has_the_smoothed_gradient():
    one, other = Steered(), Steered()
    one.pair(0.7)
    state = one.learner.state_dict()
    known = state["held_out"]
    name, mean = next(iter(known["mean"].items()))
    for bad in ({name: mean[:1]}, {"other": mean}, [mean], None):
        with pytest.raises(ValueError, match="held-out gradient"):
            other.learner.load_state_dict(state | {"held_out": known | {"mean": bad}})
    for bad in (7, known | {"position": -1}, {"mean": {}}):
        with pytest.raises(ValueError, match="position"):
            other.learner.load_state_dict(state | {"held_out": bad})
    other.learner.load_state_dict(state)
    other.model.load_state_dict(one.model.state_dict())
    for loop in (one, other):
        loop.pair(0.7)
    assert torch.equal(one.augment.policy.keep_logits, other.augment.policy.keep_logits)


def test_the_state_has_the_thermostat():
    one, other = Steered(), Steered()
    one.pair(0.7)
    other.learner.load_state_dict(one.learner.state_dict())
    assert (other.thermostat.calls, other.thermostat.accuracy) == (1, 0.7)
    plain = OLALearner(one.model, one.augment, reference=[batch(99)])
    with pytest.raises(ValueError, match="thermostat"):
        plain.load_state_dict(one.learner.state_dict())
    bad = one.learner.state_dict() | {"thermostat": {"accuracy": 7.0, "calls": 1}}
    with pytest.raises(ValueError, match="accuracy"):
        other.learner.load_state_dict(bad)
    assert other.thermostat.accuracy == 0.7


def test_the_thermostats_rule_written_out():
    accuracies = [1.0] * 60 + [0.0, 0.2, 1.0] * 10 + [0.0] * 200 + [1.0] * 60
    thermostat = Thermostat(OLAPolicy(strength=1.0))
    strength, mean = 1.0, 0.0
    seen = set()
    for accuracy in accuracies:
        mean = 0.95 * mean + (1 - 0.95) * accuracy
        if mean > 0.9:
            strength = min(strength + 0.02, 4.0)
        elif mean < 0.4:
            strength = max(strength - 0.05, 0.0)
        assert thermostat.step(accuracy) == pytest.approx(strength, abs=1e-5)
        assert thermostat.policy.strength == pytest.approx(strength, abs=1e-5)
        assert thermostat.accuracy == pytest.approx(mean)
        seen.add(round(strength, 2))
    assert 0.0 in seen  # and it rises from there
    assert strength > 0
    assert thermostat.calls == len(accuracies)


def test_at_its_bounds_a_thermostat_stays():
    policy = OLAPolicy(strength=2.0)
    edges = {"raise_above": 0.75, "lower_below": 0.25, "smoothing": 0.0, "up": 0.5, "down": 0.25}
    thermostat = Thermostat(policy, lower_after=2, most=2.5, **edges)
    steps = [(0.75, 2.0), (0.0, 2.0), (0.25, 2.0), (0.125, 1.75), (1.0, 2.25), (0.875, 2.5)]
    for accuracy, strength in steps:
        assert thermostat.step(accuracy) == strength
    policy.strength = 3.0  # above the most: it is not lowered for that
    assert thermostat.step(1.0) == 3.0
    still = Thermostat(policy, up=0, down=0, smoothing=0.0)
    assert (still.step(1.0), still.step(0.0)) == (3.0, 3.0)
    never = Thermostat(policy, lower_below=0, raise_above=0, most=0, smoothing=0.0)
    assert (never.step(0.0), never.step(1.0)) == (3.0, 3.0)
    policy.strength = 0.005
    assert Thermostat(policy, down=0.01).step(0.0) == 0


def test_states_of_a_thermostat():
    policy = OLAPolicy(strength=1.0)
    one, other = Thermostat(policy), Thermostat(policy)
    other.step(0.5)
    one.load_state_dict(other.state_dict())
    assert (one.calls, one.accuracy) == (1, other.accuracy)
    one.load_state_dict(Thermostat(policy).state_dict())
    assert (one.calls, one.accuracy) == (0, 0.0)
    one.load_state_dict({"accuracy": 1.0, "calls": 7})
    for bad, message in (
        ({"accuracy": -0.5}, r"accuracy must lie in \[0, 1\], got -0\.5"),
        ({"accuracy": 1.5}, "accuracy"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"accuracy": None}, "accuracy"),
        ({"calls": -1}, "calls must be an int of 0 or more, got -1"),
        ({"calls": 2.0}, "calls"),
        ({"calls": None}, "calls"),
    ):
        with pytest.raises(ValueError, match=message):
            one.load_state_dict(Thermostat(policy).state_dict() | bad)
        assert (one.calls, one.accuracy) == (7, 1.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda policy: Thermostat(OLAPolicy()), ValueError, "strength"),
        (lambda policy: Thermostat(UniformAugment().policy), TypeError, "OLAPolicy"),
        (lambda policy: Thermostat(policy, raise_above=0.3), ValueError, "ordered"),
        (lambda policy: Thermostat(policy, raise_above=1.5), ValueError, "ordered"),
        (lambda policy: Thermostat(policy, lower_below=-0.5), ValueError, "ordered"),
        (lambda policy: Thermostat(policy, up=-1), ValueError, "up"),
        (lambda policy: Thermostat(policy, down=-1), ValueError, "down"),
        (lambda policy: Thermostat(policy, most=5), ValueError, "most"),
        (lambda policy: Thermostat(policy, most=-1), ValueError, "most"),
        (lambda policy: Thermostat(policy, smoothing=1), ValueError, "smoothing"),
        (lambda policy: Thermostat(policy, lower_after=-1), ValueError, "lower_after"),
        (lambda policy: Thermostat(policy).step(1.5), ValueError, "accuracy"),
        (lambda policy: Thermostat(policy).step(float("nan")), ValueError, "accuracy"),
        (
            lambda policy: OLALearner(network(), transform(), thermostat=Thermostat(policy)),
            ValueError,
            "another policy",
        ),
    ],
)
def test_bad_thermostats_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(OLAPolicy(strength=1.0))
