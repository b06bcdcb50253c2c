"""The trial of a policy in the middle of a run, and what is said of it."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ola_augment import OLAAugment, OLALearner, OLAPolicy, ValueUpdater
from ola_augment.training import Trial, fit
from ola_augment.training.estimates import trusted_share
from ola_augment.training.evidence import Evidence
from ola_augment.training.recommended import check_length


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


@pytest.mark.parametrize(("sure", "prior"), [(0.0, -1.0), (0.25, 0.0), (0.5, 1.0), (0.9, 1.0)])
def test_what_is_known_of_the_operations_says_whether_help_is_expected(sure, prior):
    trial = Trial(OLAPolicy(strength=1.0), 0, 160, expected=lambda: sure)
    noise = np.array([-1, 3, -3, 1] * 4) / 30
    kinds = np.array([kind == "B" for kind in "BABBBBAB" * 2])
    run(trial, (5 - np.cumsum([0, *(0.2 + noise + 0.05 * kinds)])).tolist())
    assert trial.policy.strength == pytest.approx(np.clip(trial.contrast().t + prior, 0, 2))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))]
)
def test_a_copied_trial_asks_the_copied_updater(copied):
    augment = OLAAugment(strength=1)
    held_out = [(torch.rand(4, 3, 4, 4), torch.arange(4))]
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    learner = copied(OLALearner.recommended(model, augment, held_out, pairs=1000))
    assert learner.trial._expected.__self__ is learner.updater
    values = OLALearner.recommended(model, augment, held_out, pairs=1000).updater
    assert values.told_apart() == 0.0  # nothing is known


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


def test_no_more_is_tried_or_chosen_than_brings_the_favourite_to_every_image():
    policy = OLAPolicy(strength=1.0)
    with torch.no_grad():
        policy.keep_logits[:] = -6.0
        policy.keep_logits[3] = 0.0
    favourite = policy.log_probs().ops.exp().max().item()
    assert 0.9 < favourite < 1
    trial = Trial(policy, 0, 160, strength=3.0, expected=True)
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0)).numpy() * 0.01
    falls = np.array([0.3 if kind == "B" else 0.1 for kind in "BABBBBAB"]) + noise
    strengths = run(trial, (9 - np.cumsum([0, *falls])).tolist())
    assert max(strengths) == pytest.approx(1 / favourite)
    assert trial.contrast().t > 2
    assert [policy.strength, trial.chosen] == pytest.approx([1 / favourite] * 2)


def test_a_run_that_is_over_before_the_trial_brings_a_warning():
    """As where ``pairs`` counted the batches of which an update accumulates several."""
    learner = trying()
    assert learner.trial.last == 100
    images, labels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4) % 2
    batches = [(images, labels)] * 6
    sgd = torch.optim.SGD(learner._model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="this run has 6 pairs of steps, .* until pair 100"):
        fit(learner._model, batches, sgd, epochs=2, learner=learner)
    check_length(learner, 100)  # long enough
    learner.trial.over = True
    check_length(learner, 6)  # it ended before its time


def test_a_run_that_goes_on_is_as_long_as_it_was():
    learner, longer = trying(), trying(first=5)
    go_on(learner, 2)
    state = learner.state_dict()
    with pytest.raises(ValueError, match="pairs= that the run began with"):
        longer.load_state_dict(state)
    assert longer.pairs == 0
    state["trial"]["over"] = True  # and the strength was chosen: how long it lasted matters no more
    longer.load_state_dict(state)
    assert (longer.pairs, longer.trial.over) == (2, True)


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
    assert learner.evidence().verdict.endswith("helps: nothing is augmented")
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
    for bad in (
        None, {}, state | {"losses": [1]}, state | {"losses": None}, state | {"explored": "1"},
        state | {"count": -1}, state | {"pair": -2}, state | {"pair": None}, state | {"mean": None},
        state | {"mean": {"weight": torch.ones(2)}}, state | {"mean": {"weight": 1.0}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"is damaged|does not fit"):
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


def test_evidence_names_what_differs_and_nothing_else():
    policy = OLAPolicy(strength=1.0)
    learner_model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    held = [(torch.ones(6, 3, 8, 8), torch.zeros(6, dtype=torch.long))]
    augment = OLAAugment(strength=1.0)
    learner = OLALearner.recommended(learner_model, augment, held, pairs=500)
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


def test_a_trial_of_a_model_that_diverged_is_not_called_too_short():
    for windows, verdict in ((6, "the held-out loss was not finite"), (3, "too few steps")):
        evidence = Evidence(40, 2560, 64, (), math.nan, math.nan, windows, 0.0)
        assert evidence.verdict.startswith(verdict)
        assert evidence.verdict.endswith(" whether augmentation helps: nothing is augmented")


def test_a_model_that_is_not_the_one_trained_is_said():
    learner = trying(first=0)
    other = copy.deepcopy(learner._model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)

    def train():
        while not learner.trial.over:
            with learner.step(torch.rand(4, 3, 2, 2)) as step:
                F.cross_entropy(other(step.images), torch.arange(4) % 2).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="weights of the learner's model did not move: is it the"):
        train()
    evidence = learner.evidence()
    assert (evidence.effect, evidence.std, evidence.strength) == (0, 0, 0)
    assert evidence.verdict == (
        "the weights of the learner's model did not move, not known whether augmentation helps: "
        "nothing is augmented"
    )
    assert "nan" not in str(evidence)
    assert "held-out loss" not in str(evidence)


def test_evidence_says_how_far_the_trial_is_or_that_there_is_none():
    learner = trying()
    go_on(learner, 3)
    left = learner.trial.last - 3
    assert learner.evidence().verdict.endswith(f"helps: {left} more pairs of steps to go")
    batches = [(torch.zeros(2, 4), torch.tensor([0, 1]))]
    learner = OLALearner(network(), OLAAugment(strength=1), reference=batches)
    assert learner.evidence().verdict == (
        "not known whether augmentation helps: the learner has no trial"
    )


def test_evidence_without_pairs_that_taught():
    """What was not measured is not said to be chance, and too short a run knows it at once."""
    nothing = Evidence(0, 0, 64, (), 0.3, 0.1, 12, 2.0)
    assert "operations: not compared with each other" in str(nothing)
    batches = [(torch.zeros(2, 4), torch.tensor([0, 1]))]
    with pytest.warns(UserWarning, match="too few to try augmentation out"):
        learner = OLALearner.recommended(network(), OLAAugment(strength=1), batches, pairs=10)
    assert learner.evidence().verdict.startswith("too few steps to find out whether")


@pytest.mark.parametrize(
    ("effect", "strength", "loss", "verdict"),
    [
        (0.3, 2.0, "fell by 0.300 more", "augmentation helps here: strength 2.0 (operations an im"),
        (0.1, 1.5, "fell by 0.100 more", "not clear that augmentation helps: strength 1.5"),
        (-0.1, 0.0, "fell by 0.100 less", "no sign that augmentation helps: strength 0, nothing"),
        (-0.3, 0.0, "fell by 0.300 less", "augmentation harms here: strength 0, nothing is augm"),
    ],
)
def test_evidence_is_said_in_words(effect, strength, loss, verdict):
    evidence = Evidence(40, 2560, 64, (), effect, 0.1, 12, strength)
    assert evidence.verdict.startswith(verdict)
    lines = str(evidence).splitlines()
    assert lines[-1] == evidence.verdict
    t = f"{10 * effect:+.1f}"
    assert lines[-2].startswith(f"held-out loss {loss} in windows of steps with augmentation")
    assert lines[-2].endswith(f"(standard error 0.100, 12 windows, t = {t})")
