"""The trial of a policy in the middle of a run, the loss it looks at, and what is said of it."""

import collections
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn

from ola_augment import OLAAugment, OLALearner, OLAPolicy, ValueUpdater
from ola_augment.training import Trial
from ola_augment.training.calibration import calibrated
from ola_augment.training.epoch import known_size
from ola_augment.training.estimates import trusted_share
from ola_augment.training.held_out import HeldOut
from ola_augment.training.rejoin import Rejoin, Rejoined


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def run(trial, losses, first=0):
    """Feed a trial with what it measures at the ends of windows."""
    model, left = network(), list(losses)
    strengths = []
    for pair in range(trial.last + 1):
        trial.begin_pair(pair, False, model, lambda model: left.pop(0))
        strengths.append(trial.policy.strength)
    return strengths


def test_windows_with_and_without_come_in_turns_and_then_the_strength_is_chosen():
    policy = OLAPolicy(strength=1.0)
    trial = Trial(policy, 5, 160)
    assert (trial.length, trial.windows, trial.last) == (10, 16, 165)
    kinds = "ABBAABBA"
    # each window with augmentation takes 0.3 off the loss, each without it 0.1, but for noise:
    # clear after eight
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0)) * 0.01
    falls = [0.3 if kind == "B" else 0.1 for kind in kinds]
    losses = (5 - np.cumsum([0, *(np.array(falls) + noise.numpy())])).tolist()
    strengths = run(trial, losses)
    assert strengths[:5] == [0.0] * 5  # pairs that teach nothing
    assert strengths[5:25] == [pytest.approx(0.1 * k) for k in range(1, 21)]  # not all at once
    assert strengths[25:85] == [2.0 * (kind == "B") for kind in kinds[2:] for _ in range(10)]
    assert strengths[85:] == [pytest.approx(trial.chosen)] * 81
    assert trial.over
    assert policy.strength == trial.chosen == 2.0
    contrast = trial.contrast()
    assert contrast.windows == 6
    assert contrast.effect == pytest.approx(0.2, abs=3 * contrast.std)
    # numpy's least squares, without the first two
    design = np.stack([np.ones(6), np.arange(6), [kind == "B" for kind in kinds[2:]]], axis=1)
    taken = -np.diff(losses)[2:]
    weights, residual, *_ = np.linalg.lstsq(design, taken, rcond=None)
    std = math.sqrt(residual[0] / 3 * np.linalg.inv(design.T @ design)[2, 2])
    assert contrast.effect == pytest.approx(weights[2])
    assert contrast.std == pytest.approx(std)


def test_what_harms_is_given_up_before_its_time():
    policy = OLAPolicy(strength=1.0)
    trial = Trial(policy, 0, 160)
    falls = [0.1 if kind == "B" else 0.3 for kind in "ABBAABBAABBA"]
    losses = 5 - np.cumsum([0, *(np.array(falls) + 0.01 * np.sin(np.arange(12)))])
    strengths = run(trial, losses.tolist())
    assert trial.over
    assert trial.contrast().windows == 6
    assert strengths[80:] == [0.0] * 81
    trial.begin_pair(200, True, network(), None)  # nothing is measured any more
    assert policy.strength == 0.0


def test_where_augmentation_is_expected_to_help_most_windows_are_with_it():
    trial = Trial(OLAPolicy(strength=1.0), 0, 160, strength=3.0, expected=True)
    kinds = np.array([kind == "B" for kind in "BABBBBAB"])
    falls = np.linspace(0.4, 0.1, 8) + 0.2 * kinds  # a trend takes no side
    noise = 0.01 * np.sin(np.arange(8))
    strengths = run(trial, (9 - np.cumsum([0, *(falls + noise)])).tolist())
    assert strengths[20:80:10] == [3.0 if kind else 0.0 for kind in kinds[2:]]
    assert trial.contrast().windows == 6
    assert trial.contrast().effect == pytest.approx(0.2, abs=0.02)
    assert trial.policy.strength == 2.0


@pytest.mark.parametrize("expected", [True, False])
def test_what_is_new_to_a_model_is_not_held_against_it(expected):
    trial = Trial(OLAPolicy(strength=1.0), 0, 160, expected=expected)
    turns = "BABBBBAB" if expected else "ABBAABBA"
    falls = 0.1 + 0.2 * np.array([kind == "B" for kind in turns]) + 0.01 * np.sin(np.arange(8))
    falls[turns.index("B")] = -3.0  # the first window of its kind
    run(trial, (9 - np.cumsum([0, *falls])).tolist())
    assert trial.contrast().effect == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("lead", [-3.0, -1.0, 0.0, 0.7, 1.5, 6.0])
def test_the_clearer_it_is_the_sooner_it_ends(lead, expected):
    trial = Trial(OLAPolicy(strength=1.0), 0, 160, expected=expected)
    noise = np.array([-1, 3, -3, 1] * 4) / 30
    kinds = np.array([kind == "B" for kind in ("BABBBBAB" if expected else "ABBAABBA") * 2])
    run(trial, (5 - np.cumsum([0, *(0.2 + noise + 0.05 * lead * kinds)])).tolist())
    contrast, prior = trial.contrast(), 1 if expected else -1
    assert contrast.windows in (6, 10, 14)
    assert (contrast.t < -prior or contrast.t > 2) == (contrast.windows < 14)
    assert trial.policy.strength == pytest.approx(np.clip(contrast.t + prior, 0, 2))


def test_no_more_is_chosen_than_the_policy_has_or_is_told():
    assert Trial(OLAPolicy(strength=1.0, max_ops=1), 0, 160).most == 1.0
    assert Trial(OLAPolicy(strength=1.0), 0, 160, most=4).most == 4.0


def test_a_trial_without_any_time_ends_with_the_first_pair():
    policy = OLAPolicy(strength=1.0)
    trial = Trial(policy, 0, 0)
    trial.begin_pair(0, True, network(), lambda model: 1.0)
    assert trial.over
    assert policy.strength == 0.0


def trying(first=4):
    """A learner whose trial has windows of six pairs, from the fifth pair on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    augment = OLAAugment(strength=1.5, generator=torch.Generator().manual_seed(0))
    held_out = [(torch.rand(8, 3, 2, 2), torch.arange(8) % 2)]
    trial = Trial(augment.policy, first, 96, strength=3.0)
    return OLALearner(
        model, augment, reference=held_out, learn_every=2, learn_pairs=first, trial=trial
    )


def go_on(learner, pairs):
    for _ in range(2 * pairs):
        with learner.step(torch.rand(4, 3, 2, 2)) as step:
            F.cross_entropy(learner._model(step.images), torch.arange(4) % 2).backward()
        learner._model.zero_grad()


@pytest.mark.parametrize(("pairs", "strength"), [(2, 0.0), (3, 1.5)])
def test_a_policy_that_is_frozen_before_its_trial_has_the_strength_it_came_with(pairs, strength):
    learner = trying()
    go_on(learner, pairs)
    assert learner.policy.strength == strength
    learner.transform.freeze()
    go_on(learner, 3)
    assert learner.policy.strength == 1.5
    assert learner.evidence().verdict.startswith("not known whether augmentation helps: the policy")


@pytest.mark.parametrize(("windows", "tried"), [(3, 0.0), (5, 3.0)])
def test_a_policy_that_is_frozen_in_its_trial_ends_it(windows, tried):
    """With too few windows there is no augmentation, as in a run that is too short."""
    learner = trying()
    go_on(learner, 4 + 6 * windows + 3)
    assert learner.policy.strength == tried
    learner.transform.freeze()
    go_on(learner, 1)
    assert learner.trial.over
    assert learner.policy.strength == 0
    assert learner.evidence().verdict.endswith("whether augmentation helps: strength 0")
    learner.policy.requires_grad_()
    go_on(learner, 12)
    assert learner.policy.strength == 0


def test_what_a_frozen_trial_has_seen_decides():
    policy = OLAPolicy(strength=1.0)
    trial = Trial(policy, 0, 160, expected=True)
    model, losses = network(), iter([3.0, 3.1, 2.9, 3.0, 3.1, 2.9, 3.0, 3.1, 2.9, 3.0])
    for pair in range(86):  # in the ninth window
        trial.begin_pair(pair, False, model, lambda model: next(losses))
    assert not trial.over  # nothing is clear
    trial.stop()
    assert trial.over
    assert policy.strength == trial.chosen > 0


def test_a_strength_that_is_set_after_freezing_stays():
    for pairs in (2, 30):
        learner = trying()
        go_on(learner, pairs)
        learner.transform.freeze()
        learner.policy.strength = 0.5
        go_on(learner, 2)
        assert learner.policy.strength == 0.5
    assert learner.evidence().verdict.endswith("strength 0.5")


def test_a_policy_that_learns_again_after_the_pairs_that_teach_draws_by_what_was_learned():
    learner = trying()
    go_on(learner, 2)
    learner.transform.freeze()
    go_on(learner, 14)  # through the first window and a half
    learner.policy.requires_grad_()
    go_on(learner, 1)
    assert not learner.updater.explores
    go_on(learner, 6)
    assert learner.trial.over  # which missed windows
    assert learner.policy.strength == 0


@pytest.mark.parametrize("pairs", [0, 1, 47])
def test_where_there_is_no_time_there_is_no_augmentation(pairs):
    policy = OLAPolicy(strength=1.0)
    trial = Trial(policy, 3, pairs)
    assert (trial.windows, trial.last) == (0, 3)
    for pair in range(4):
        trial.begin_pair(pair, pair == 1, network(), lambda model: 1.0)
        assert policy.strength == (1.0 if pair == 1 else 0.0)
    assert trial.over
    assert math.isnan(trial.contrast().t)


def test_the_loss_is_measured_with_the_mean_weights_of_half_a_window_and_leaves_no_trace():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.5)).train()
    trial = Trial(OLAPolicy(strength=1.0), 0, 160)
    seen = []

    def loss(model):
        assert not model[1].training
        seen.append(model[0].weight.item())
        return 0.0

    for pair in range(21):
        with torch.no_grad():
            model[0].weight.fill_(float(pair))
        trial.begin_pair(pair, False, model, loss)
        trial.begin_pair(pair, False, model, loss)  # once a pair
        assert model[0].weight.item() == pair
        assert model[1].training
    # at the start; weights 6 .. 10 of the first window, 16 .. 20 of the second
    assert seen == pytest.approx([0.0, 8.0, 18.0])


def test_the_state_of_a_trial_goes_on_bit_by_bit():
    def begin(trial, model, pairs):
        for pair in pairs:
            with torch.no_grad():
                model.weight.add_(0.1 * pair)
            trial.begin_pair(pair, False, model, lambda model: model.weight.sum().item())

    model, trial = network(), Trial(OLAPolicy(strength=1.0), 2, 160)
    begin(trial, model, range(100))
    other, again = copy.deepcopy(model), Trial(OLAPolicy(strength=1.0), 2, 160)
    state = copy.deepcopy(trial.state_dict())
    again.checked(state, other)()
    begin(trial, model, range(100, 170))
    begin(again, other, range(100, 170))
    assert trial.over
    assert trial.contrast() == again.contrast()
    for bad in (None, {}, state | {"losses": [1]}, state | {"mean": {"weight": torch.ones(2)}}):
        with pytest.raises(ValueError, match=r"trial is damaged|does not fit"):
            again.checked(bad, other)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Trial(OLAPolicy(), 0, 9), ValueError, "learns its strength"),
        (lambda: Trial(None, 0, 9), TypeError, "OLAPolicy"),
        (lambda: Trial(OLAPolicy(strength=1), -1, 9), ValueError, "0 or more"),
        (lambda: Trial(OLAPolicy(strength=1), 0, 9, strength=0), ValueError, "strength must"),
        (lambda: Trial(OLAPolicy(strength=1), 0, 9, most=5), ValueError, "most in"),
    ],
)
def test_bad_trials_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


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


def test_noise_is_not_trusted_and_a_difference_is():
    noise = torch.randn(1000, 19, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([trusted_share(row) for row in noise])
    assert shares.mean() < 0.2
    assert trusted_share(torch.tensor([9.0, *[0.1] * 18])) > 0.7
    assert trusted_share(torch.zeros(3)) == 0


def test_shrunk_values_of_noise_leave_the_policy_nearly_uniform():
    policy = OLAPolicy(strength=1.0)
    updater = ValueUpdater(policy, decay=1.0, shrink=True, reward=lambda alignments: alignments)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        actions = policy.sample(64, torch.Generator().manual_seed(int(updater.steps)))
        updater.step(actions, torch.randn(64, generator=generator))
    assert (updater.steps, updater.examples) == (30, 30 * 64)
    probs = policy.log_probs().ops.exp()
    assert probs.max() / probs.min() < 4


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


def test_a_layer_that_is_replaced_in_a_trial_begins_a_new_mean():
    model, trial = nn.Sequential(nn.Linear(2, 2)), Trial(OLAPolicy(strength=1.0), 0, 160)
    for pair in range(9):
        trial.begin_pair(pair, False, model, lambda model: 0.0)
    model[0] = nn.Linear(2, 3)
    seen = []
    for pair in range(9, 11):
        trial.begin_pair(
            pair, False, model, lambda model: seen.append(model[0].weight.clone()) or 0.0
        )
    assert torch.equal(seen[0], model[0].weight)


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


def test_flat_images_are_counted_on_after_a_stop():
    learner, other = (
        OLALearner.recommended(nn.Linear(1, 2), OLAAugment(strength=1.0), [examples(1000, 8)], 1200)
        for _ in range(2)
    )
    learner._flats.augmented, learner._flats.flat = 90, 4
    other.load_state_dict(learner.state_dict())
    assert (other.augmented, other.flat) == (90, 4)
    with pytest.raises(ValueError, match="damaged: counts"):
        other.load_state_dict({**learner.state_dict(), "flat": {"augmented": 1, "flat": -1}})


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


def test_evidence_names_what_differs_and_nothing_else():
    policy = OLAPolicy(strength=1.0)
    learner_model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    held = [(torch.ones(6, 3, 8, 8), torch.zeros(6, dtype=torch.long))]
    augment = OLAAugment(strength=1.0)
    learner = OLALearner.recommended(learner_model, augment, held, pairs=400)
    policy = augment.policy
    names = [operation.name for operation in policy.space.operations]
    rotate = names.index("rotate")
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        actions = policy.sample(64, torch.Generator().manual_seed(step))
        good = (actions.keep & (actions.ops == rotate)).any(1)
        signal = torch.randn(64, generator=generator) + good
        learner.updater.step(actions, signal, torch.ones(64))
    evidence = learner.evidence()
    assert (evidence.pairs, evidence.examples, evidence.held_out) == (40, 2560, 6)
    assert evidence.operations[0].name == "rotate"
    assert evidence.operations[0].differs
    assert sum(operation.differs for operation in evidence.operations) <= 2
    assert "rotate (t = +" in str(evidence)
    assert evidence.strength is None
    assert "not yet known" in evidence.verdict
    with pytest.raises(TypeError, match="GARUpdater values no operations"):
        OLALearner(learner_model, OLAAugment()).evidence()
