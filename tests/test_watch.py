"""What a user sees of a run: text, metrics by name, loggers; and what is kept of it."""

import csv
import json
import re
import sys

import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode

from ola_augment import (
    GARUpdater,
    OLAAugment,
    OLALearner,
    OLAPolicy,
    Operation,
    PolicyTransform,
    RandAugment,
    SearchSpace,
    TrivialAugment,
    UniformAugment,
    UniformPolicy,
    load_policy,
    save_policy,
)
from ola_augment.plots import (
    augmented_samples,
    describe,
    policy_over_time,
    policy_tables,
    sample_strip,
)
from ola_augment.training import Callback, CSVLogger, TensorBoardLogger, fit, policy_metrics
from ola_augment.training.metrics import progress_text

SPACE = SearchSpace(
    (Operation("identity"), Operation("rotate", 0, 30, integer=True, signed=True),
     Operation("posterize", 8, 4, integer=True), Operation("color", 0.1, 1.9),
     Operation("translate_x", 0, 16, integer=True, side="width"))
)  # fmt: skip


def batches(n=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8 * n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return list(zip(images.split(8), (torch.arange(8 * n) % 2).split(8), strict=True))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


def run(augment=None, epochs=2, network=None, **options):
    network = network or model()
    augment = augment or OLAAugment(SPACE, generator=torch.Generator().manual_seed(0))
    if "learner" not in options:
        options["learner"] = OLALearner(network, augment)
    options.setdefault("progress", False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    return fit(network, batches(), optimizer, epochs=epochs, **options)


def moved(max_ops=2):
    augment = OLAAugment(SPACE, max_ops=max_ops)
    with torch.no_grad():
        augment.policy.keep_logits.copy_(torch.tensor([0.0, 2.3, -3.0, 0.5, 1.0]))
        augment.policy.magnitude_logits[1, 30] = 50.0
        augment.policy.num_ops_logits[-1] = 50.0
    return augment


def test_a_summary_says_what_the_policy_does():
    lines = moved().policy.summary().splitlines()
    assert lines[0] == "OLAPolicy over 'custom' (5 operations)"
    kept = torch.tensor([0.0, 2.3, -3.0, 0.5, 1.0]).sigmoid().mean()
    assert lines[1].startswith(f"applied to an image on average: {2 * kept:.2f}; drawn: 2")
    assert lines[2:] == [
        "rotate: kept 0.91, mean ±30°",
        "translate_x: kept 0.73, mean 7.55 px",
        "color: kept 0.62, mean 1",
        "identity: kept 0.50",
        "posterize: kept 0.05, mean 6.45 bits",
    ]
    assert "mean 15.5 px" in moved().policy.summary(64, 64)


def test_the_bar_names_no_favourite_where_all_are_alike():
    alike = {"draw_probs": {"rotate": 0.5, "color": 0.5}}
    assert progress_text({"accuracy": 0.9} | alike) == "accuracy 90.0 %"
    assert progress_text({"draw_probs": {"rotate": 0.8, "color": 0.2}}) == (
        "draws rotate 0.80, seldom color 0.20"
    )


@pytest.mark.parametrize(
    "transform",
    [UniformAugment(), RandAugment(), RandAugment(num_ops=0), TrivialAugment(),
     OLAAugment(strength=1.5), OLAAugment(max_ops=3)],
)  # fmt: skip
def test_every_kind_of_policy_has_a_summary(transform):
    lines = transform.policy.summary(100, 40).splitlines()
    assert len(lines) == 2 + len(transform.space)
    drawn = transform.policy.sample(4000, torch.Generator().manual_seed(0)).keep.sum(1)
    said = float(lines[1].split(": ")[1].split(";")[0])
    assert said == pytest.approx(float(drawn.double().mean()), abs=0.1)


def test_an_operation_of_ones_own_has_no_unit():
    own = Operation("wobble", 0, 1, kernel=lambda images, m: images)
    assert "wobble: kept 0.50, mean 0.5" in UniformPolicy(SearchSpace((own,)), 1).summary()


def test_metrics_have_the_names_of_operations_and_the_accuracy():
    record = run()[-1]
    assert list(record["keep_probs"]) == [operation.name for operation in SPACE.operations]
    assert list(record["mean_magnitude_bins"]) == ["rotate", "posterize", "color", "translate_x"]
    assert 0 <= record["augmented_accuracy"] <= 1
    assert record["plain_accuracy"] is not None
    json.dumps(record)


def test_accuracy_is_the_share_of_right_predictions():
    class Knows(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2))

        def forward(self, images):
            right = torch.arange(len(images)) % 2
            right[0] = 1  # a wrong one in eight
            return nn.functional.one_hot(right, 2) + self.bias

    network = Knows()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    [record] = fit(network, batches(), optimizer, epochs=1, progress=False)
    assert record["plain_accuracy"] == 7 / 8


def test_what_is_no_classifier_has_no_accuracy():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    [record] = fit(
        network,
        [(images, labels.float()) for images, labels in batches()],
        torch.optim.SGD(network.parameters(), lr=0.01),
        epochs=1,
        criterion=lambda out, targets: nn.functional.mse_loss(out[:, 0], targets),
        progress=False,
    )
    assert record["plain_accuracy"] is None


def test_the_progress_bar_says_what_happens(capsys):
    run(progress=True)
    shown = capsys.readouterr().err
    assert "OLAAugment, epoch 2/2" in shown
    assert "accuracy " in shown
    assert "keeps " in shown
    assert "drops " in shown
    assert "entropy" not in shown


def test_rows_of_a_csv_file_outlast_a_stop_and_not_a_new_run(tmp_path):
    path, checkpoint = tmp_path / "metrics.csv", tmp_path / "run.pt"
    history = run(epochs=2, callbacks=[CSVLogger(path)], checkpoint_path=checkpoint)
    history = run(epochs=4, callbacks=[CSVLogger(path)], resume=checkpoint)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    for row, record in zip(rows, history, strict=True):
        assert float(row["keep_probs/rotate"]) == record["keep_probs"]["rotate"]
        assert float(row["num_ops_probs/1"]) == record["num_ops_probs"][0]
    run(epochs=1, callbacks=[CSVLogger(path)])
    assert len(path.read_text().splitlines()) == 2
    path.write_text("something\nelse\n")
    with pytest.raises(ValueError, match="no CSV file of epochs"):
        CSVLogger(path).on_epoch({"epoch": 2})


def test_columns_may_come_later(tmp_path):
    logger = CSVLogger(tmp_path / "metrics.csv")
    logger.on_epoch({"epoch": 1, "loss": None})
    logger.on_epoch({"epoch": 2, "loss": 0.5, "accuracy": 0.25})
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert rows == [
        {"epoch": "1", "loss": "", "accuracy": ""},
        {"epoch": "2", "loss": "0.5", "accuracy": "0.25"},
    ]


def test_tensorboard_sees_losses_and_the_policy(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = run(callbacks=[TensorBoardLogger(tmp_path)])
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [entry.step for entry in events.Scalars("loss")] == list(range(1, 9))
    kept = events.Scalars("keep_probs/rotate")
    assert [entry.step for entry in kept] == [4, 8]
    assert kept[-1].value == pytest.approx(history[-1]["keep_probs"]["rotate"])
    assert "plain_accuracy" in events.Tags()["scalars"]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path)


def test_what_a_callback_adds_is_kept():
    class Note(Callback):
        def on_epoch(self, record):
            record["note"] = record["epoch"] * 10

    assert [record["note"] for record in run(callbacks=[Note()])] == [10, 20]


def test_a_transform_comes_back(tmp_path):
    augment = OLAAugment(SPACE, max_ops=3, interpolation=InterpolationMode.BILINEAR, fill=(1, 2, 3))
    with torch.no_grad():
        augment.policy.keep_logits.copy_(torch.arange(5.0))
    augment.save(tmp_path / "policy.json")
    generator = torch.Generator().manual_seed(0)
    again = OLAAugment.load(tmp_path / "policy.json", generator=generator)
    assert type(again) is OLAAugment
    assert (again.interpolation, again.fill) == (InterpolationMode.BILINEAR, (1, 2, 3))
    assert again.generator is generator
    images = batches()[0][0]
    _, actions = augment.augment(images)
    assert torch.equal(again.replay(images, actions), augment.replay(images, actions))
    assert torch.equal(again.policy.log_prob(actions), augment.policy.log_prob(actions))
    assert torch.equal(load_policy(tmp_path / "policy.json").keep_logits, torch.arange(5.0))
    again.augment(images)  # a whole transform


@pytest.mark.parametrize("transform", [UniformAugment(), RandAugment(3, 5), TrivialAugment()])
def test_every_transform_comes_back(transform, tmp_path):
    transform.save(tmp_path / "policy.json")
    again = type(transform).load(tmp_path / "policy.json")
    assert repr(again) == repr(transform)
    assert repr(PolicyTransform.load(tmp_path / "policy.json").policy) == repr(transform.policy)
    with pytest.raises(ValueError, match=r"holds a \w+Policy, OLAAugment needs a OLAPolicy"):
        OLAAugment.load(tmp_path / "policy.json")


def test_the_file_of_a_policy_alone_makes_a_transform(tmp_path):
    save_policy(OLAPolicy("rand_augment"), tmp_path / "policy.json")
    loaded, made = OLAAugment.load(tmp_path / "policy.json"), OLAAugment("rand_augment")
    assert loaded.fill is None
    assert repr(loaded) == repr(made)


@pytest.mark.parametrize("fill", [[1, 2], [1, 2, 3, 4, 5], 0, None])
def test_a_fill_for_any_number_of_channels_comes_back(tmp_path, fill):
    OLAAugment(SPACE, fill=fill).save(tmp_path / "policy.json")
    loaded = OLAAugment.load(tmp_path / "policy.json").fill
    assert loaded == (tuple(fill) if isinstance(fill, list) else fill)


def test_a_fill_by_type_comes_back(tmp_path):
    fill = {tv_tensors.Mask: 255, tv_tensors.Image: (1, 2, 3), "others": 4}
    OLAAugment(SPACE, fill=fill).save(tmp_path / "policy.json")
    assert OLAAugment.load(tmp_path / "policy.json").fill == fill

    class Own(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="cannot be saved"):
        OLAAugment(SPACE, fill={Own: 3}).save(tmp_path / "policy.json")


@pytest.mark.parametrize(
    "settings",
    [[], "x", {"fill": "1"}, {"fill": []}, {"fill": [1, "2"]}, {"fill": float("nan")},
     {"interpolation": 3}, {"interpolation": "bicubic"},
     {"fill": {"Own": 3}}, {"interpolation": []}, {"fill": [True, 1, 1]}],
)  # fmt: skip
def test_damaged_settings_of_a_transform_are_refused(tmp_path, settings):
    path = tmp_path / "policy.json"
    OLAAugment(SPACE).save(path)
    content = json.loads(path.read_text()) | {"transform": settings}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="policy file"):
        OLAAugment.load(path)


def test_a_space_with_kernels_of_ones_own_is_given(tmp_path):
    own = Operation("half", kernel=lambda images, magnitudes: images / 2)
    space = SearchSpace((*SPACE.operations, own))
    OLAAugment(space).save(tmp_path / "policy.json")
    with pytest.raises(ValueError, match="half"):
        OLAAugment.load(tmp_path / "policy.json")
    assert OLAAugment.load(tmp_path / "policy.json", space).space is space


def test_a_frozen_policy_stays_and_goes_on_augmenting():
    augment = OLAAugment(SPACE, generator=torch.Generator().manual_seed(0))
    network = model()
    learner = OLALearner(network, augment)
    assert augment.freeze() is augment
    before = policy_metrics(augment.policy)
    history = run(augment, network=network, learner=learner)
    assert policy_metrics(augment.policy) == before
    assert history[-1]["reward_mean"] is None
    assert learner.pairs == 4
    assert learner.skipped.total() == 0
    augment.policy.requires_grad_()
    assert run(augment, network=network, learner=learner)[-1]["reward_mean"] is not None
    assert policy_metrics(augment.policy) != before


def test_a_capture_costs_nothing_when_the_policy_is_frozen(monkeypatch):
    augment, network = OLAAugment(SPACE), model()
    learner = OLALearner(network, augment)
    augment.freeze()
    monkeypatch.setattr(learner._signal, "capture", lambda *_: pytest.fail("captured"))
    with learner.augmented_step():
        network(learner.augment(batches()[0][0]) / 255).sum().backward()
    with learner.plain_step() as step:
        network(batches()[1][0] / 255).sum().backward()
    assert step.stats is None


def test_an_updater_of_a_frozen_policy_says_so():
    augment = OLAAugment(SPACE)
    updater = GARUpdater(augment.policy)
    augment.freeze()
    with pytest.raises(RuntimeError, match="frozen"):
        updater.step(augment.policy.sample(4), torch.randn(4))


def test_labels_have_units():
    actions = moved(max_ops=4).policy.sample(1)
    actions.num_ops[:] = 4
    actions.ops[:] = torch.tensor([[1, 2, 4, 3]])
    actions.keep[:] = True
    actions.magnitude_bins[:] = 30
    actions.signs[:] = torch.tensor([[-1, 1, 1, 1]])
    assert describe(actions, SPACE, 32, 32) == ["rotate -30°\nposterize 4 bits\ntranslate_x 16 px\n"
                                                "color 1.9"]  # fmt: skip


def test_pictures_of_a_policy_are_sorted_and_numbered():
    augment = moved()
    history = [
        {"epoch": epoch, **policy_metrics(policy)}
        for epoch, policy in enumerate((OLAPolicy(SPACE, 2), augment.policy), start=1)
    ]
    for figure in (
        policy_over_time(history, SPACE),
        policy_over_time(history[1:], SPACE),
        policy_tables({"before": OLAPolicy(SPACE, 2), "after": augment.policy}),
        policy_tables(augment.policy),
    ):
        axes = figure.axes[0]
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == ["rotate", "translate_x", "color", "identity", "posterize"]
        figure.canvas.draw()
    with pytest.raises(ValueError, match="no policy"):
        policy_over_time([{"epoch": 1}], SPACE)
    with pytest.raises(ValueError, match="of the operations"):
        policy_over_time(history, SearchSpace.wide_long())
    with pytest.raises(ValueError, match="same operations"):
        policy_tables({"a": OLAPolicy(SPACE), "b": OLAPolicy()})


def numbers(axes):
    return [text.get_text() for text in axes.texts]


def test_two_policies_stand_side_by_side_and_magnitudes_only_where_there_are_any():
    figure = policy_tables({"before": OLAPolicy(SPACE, 2), "after": moved().policy})
    before, after, magnitudes = figure.axes
    titles = [axes.get_title().split("\n") for axes in figure.axes[:2]]
    assert titles == [["before", "kept with probability"], ["after", "kept with probability"]]
    assert numbers(before) == ["0.50"] * 5
    assert numbers(after) == ["0.91", "0.73", "0.62", "0.50", "0.05"]
    assert numbers(magnitudes) == [
        "0°", "±30°", "0 px", "16 px", "0.1", "1.9", "8 bits", "4 bits",
    ]  # fmt: skip
    assert len(magnitudes.patches) == 2 * 4


KINDS = [UniformAugment(), RandAugment(), TrivialAugment(), OLAAugment(strength=1.5)]


@pytest.mark.parametrize("transform", KINDS)
def test_every_kind_of_policy_has_pictures(transform):
    policy_tables(transform.policy).canvas.draw()
    augmented_samples(transform, batches()[0][0][:2], draws=2).canvas.draw()


def test_samples_change_the_image_the_most_likely_first():
    augment = moved(max_ops=1)
    augment.generator = torch.Generator().manual_seed(0)
    images = batches()[0][0][:3]
    with torch.no_grad():
        augment.policy.keep_logits.copy_(torch.tensor([5.0, -4.0, -4.0, -4.0, -5.0]))
    figure = augmented_samples(augment, images, 4, labels=["cat", "dog", "cow"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[::5] == ["cat", "dog", "cow"]
    drawn = [title for index, title in enumerate(titles) if index % 5]
    assert all(name.split()[0] in ("rotate", "posterize", "color", "translate_x") for name in drawn)
    for start in (0, 4, 8):  # a rotation has one likely magnitude, the others have 31
        row = [title.startswith("rotate") for title in drawn[start : start + 4]]
        assert row == sorted(row, reverse=True)
    assert "most likely first" in figure.get_suptitle()


def test_names_of_classes_are_no_formulas():
    images, names = batches()[0][0][:2], ["$x_$", r"$\a_{"]
    augmented_samples(UniformAugment(), images, labels=names).canvas.draw()
    sample_strip({r"$\b_$": UniformAugment()}, images, labels=names).canvas.draw()


def test_a_policy_that_applies_nothing_shows_that():
    figure = augmented_samples(RandAugment(num_ops=0), batches()[0][0][:1], draws=2)
    assert [axes.get_title() for axes in figure.axes] == ["original", "unchanged", "unchanged"]
    assert "0 %" in figure.get_suptitle()


def test_floats_grey_images_and_strips():
    images = torch.rand(3, 1, 12, 10)
    augmented_samples(OLAAugment(), images, draws=1).canvas.draw()
    strip = sample_strip(
        {"before": UniformAugment(), "after": OLAAugment()}, images, labels=["a", "b", "c"]
    )
    strip.canvas.draw()
    assert [axes.get_title() for axes in strip.axes[:3]] == ["a", "b", "c"]
    assert numbers(strip.axes[6]) == ["after"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: augmented_samples(OLAAugment(), i[:0]), "at least one image"),
        (lambda i: augmented_samples(OLAAugment(), i, draws=0), "draws must be at least 1"),
        (lambda i: augmented_samples(OLAAugment(), i, labels=["a"]), "one for each of 8 images"),
        (lambda i: sample_strip({}, i), "at least one transform"),
        (lambda i: policy_tables({}), "at least one"),
    ],
)
def test_pictures_refuse_what_they_cannot_show(call, message):
    with pytest.raises(ValueError, match=message):
        call(batches()[0][0])


def test_a_policy_of_given_strength_is_shown_by_what_it_draws(capsys):
    augment = OLAAugment(SPACE, strength=1.5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        augment.policy.keep_logits.copy_(torch.tensor([0.0, 9.0, -9.0, -9.0, -9.0]))
    lines = augment.policy.summary().splitlines()
    assert lines[1] == "applied to an image on average: 1.10; drawn: 4"  # an operation once
    assert lines[2].startswith("rotate: drawn 0.67, mean ±")
    history = run(augment, progress=True)
    assert re.search(r"draws \w+ 0\.", capsys.readouterr().err)
    assert history[-1]["applied_ops"] == pytest.approx(augment.policy.applied_ops().item())
    figure = policy_over_time(history, SPACE)
    assert "draw an operation, start 0.2" in figure.axes[0].get_title()
    assert figure.axes[1].get_title() == "operations applied to an image"
    figure.canvas.draw()
    bars = policy_tables({"kept": OLAPolicy(SPACE), "drawn": augment.policy}).axes[:2]
    assert bars[1].get_title() == "drawn\ndrawn with probability"
    assert [line.get_xdata()[0] for line in (bars[0].lines[0], bars[1].lines[0])] == [0.5, 0.2]
