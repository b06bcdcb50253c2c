"""Every example runs, and what it shows is so."""

import dataclasses
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from ola_augment import OLAAugment, OLALearner, OLAPolicy, load_policy

pytestmark = pytest.mark.filterwarnings("ignore:.*pairs of steps are too few")

EXAMPLES = Path(__file__).parents[1] / "examples"
matplotlib.use("agg")


def gallery(name):
    """Run a gallery script in this process; return its variables."""
    try:
        return runpy.run_path(str(EXAMPLES / name))
    finally:
        plt.close("all")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script's main in this process; return what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_main(script, *arguments):
        script = runpy.run_path(str(EXAMPLES / script), run_name="example")
        script["main"]([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run_main


def test_plot_operations():
    gallery("plot_operations.py")


def test_plot_learning():
    shown = gallery("plot_learning.py")
    assert shown["learner"].settled
    assert shown["learner"].evidence().pairs > 20


def test_theorem_1():
    """The cosine between expected GAR update and true meta-gradient tends to 1."""
    shown = gallery("plot_theorem_1.py")
    errors = [1 - cosine for cosine in shown["cosines"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
    assert errors[-1] < errors[0] / 50
    assert all(ratio > 10 for ratio in shown["ratios"])


def test_mislabelled_examples_are_ranked():
    """Far better than the 15 % of chance; the loss, which is better still, stands beside it."""
    shown = gallery("plot_mislabelled.py")
    assert shown["found"]["alignment"] > 0.3
    assert shown["found"]["loss"] > shown["found"]["alignment"]


def test_learned_loss_weights_resist_wrong_labels():
    shown = gallery("plot_loss_weights.py")
    assert shown["area"] > 0.9
    assert shown["learned_accuracy"] > shown["equal_accuracy"] + 0.02


def test_the_clean_data_set_is_preferred():
    shown = gallery("plot_mixing_datasets.py")
    assert shown["shares"][-1, 0] > 0.8
    assert shown["learned_accuracy"] > shown["plain_accuracy"]


def test_train_on_digits_writes_what_it_says(run, tmp_path):
    methods = ["none", "randaugment", "trivialaugment", "uniform", "ola"]
    printed = run(
        "train.py", "--train-size", 64, "--epochs", 4, "--batch-size", 32, "--quiet",
        "--seeds", 2, "--method", *methods, "--out", tmp_path,
    )  # fmt: skip
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows[1:]] == methods
    assert all("±" in row for row in rows[1:])
    for method in methods:
        out = tmp_path / f"{method}-seed1"
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]
        assert (out / "samples.png").exists() == (method != "none")
    policy = load_policy(tmp_path / "ola-seed1" / "policy.json")
    assert policy.strength == 0  # too few steps to try augmentation out
    assert "too few steps" in (tmp_path / "ola-seed1" / "evidence.txt").read_text()
    assert not (tmp_path / "ola-seed1" / "policy.png").exists()


@pytest.mark.parametrize("packed", [False, True], ids=["directory", "zip"])
def test_train_on_a_folder_of_images(run, tmp_path, packed):
    source = tmp_path / "images"
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, level in (("dark", 60), ("light", 200)):
            (source / part / label).mkdir(parents=True)
            for i in range(20):
                pixels = generator.integers(0, 50, (40, 30, 3)) + level
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(source / part / label / f"{i}.png")
    if packed:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for file in source.rglob("*.png"):
                archive.write(file, file.relative_to(source))
        source = tmp_path / "images.zip"
    printed = run(
        "train.py", "--data", f"imagefolder:{source}", "--epochs", 3, "--batch-size", 8,
        "--model", "wrn-10-1", "--method", "ola", "--settings", "paper", "--cutout", 8, "--quiet",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert "40 training images" in printed
    assert (tmp_path / "out" / "ola-seed0" / "policy.png").stat().st_size > 10_000


def test_an_image_that_cannot_be_read_is_named(run, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "png")
    good = buffer.getvalue()
    large = io.BytesIO()
    Image.new("1", (9000, 9000)).save(large, "png")
    for bad in (b"no image", good[:60], large.getvalue()):
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for part in ("train", "test"):
                for name in "ab":
                    archive.writestr(f"{part}/{name}/1.png", good)
            archive.writestr("train/b/bad.png", bad)
        with pytest.raises(ValueError, match=r"cannot read the image train/b/bad\.png of .*\.zip"):
            run("train.py", "--data", f"imagefolder:{tmp_path / 'images.zip'}", "--out", tmp_path)


@pytest.mark.parametrize("packed", [False, True], ids=["directory", "zip"])
def test_images_that_cannot_be_read_are_named_at_once(tmp_path, monkeypatch, packed):
    """Of all parts, whether Pillow knows their format or finds their end missing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(buffer, "png")
    good, source = buffer.getvalue(), tmp_path / "images"
    bad = {"train/a/0": b"no image", "train/b/1": good[:500], "test/b/0": good[:500]}
    for name in [
        f"{part}/{label}/{i}" for part in ("train", "test") for label in "ab" for i in "01"
    ]:
        (file := source / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bad.get(name, good))
    if packed:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for file in source.rglob("*.png"):
                archive.write(file, file.relative_to(source))
        source = tmp_path / "images.zip"
    with pytest.raises(ValueError, match="cannot read the image") as caught:
        importlib.import_module("data").load_data(f"imagefolder:{source}", image_size=8)
    found = str(caught.value).split("; ")
    assert len(found) == 3
    assert all(any(f"{name}.png" in text for text in found) for name in bad)


def test_hidden_files_are_no_images_and_sixteen_bits_become_eight(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(levels).save(tmp_path / part / "a" / "deep.PNG")
        (tmp_path / part / "a" / "._deep.PNG").write_text("what macOS leaves")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in tmp_path.rglob("*.PNG"):
            archive.write(file, file.relative_to(tmp_path))
            archive.writestr(f"__MACOSX/{file.relative_to(tmp_path)}", "more of it")
    load_data = importlib.import_module("data").load_data
    for source in (tmp_path, tmp_path / "images.zip"):
        (image,) = load_data(f"imagefolder:{source}", image_size=8).train_images
        assert torch.equal(image[0], torch.from_numpy(levels // 257).to(torch.uint8))


@pytest.mark.parametrize(("bits", "brightest"), [(10, 1023), (12, 3000), (16, 60000), (8, 200)])
def test_deep_grey_is_scaled_by_the_range_of_the_data_set(tmp_path, monkeypatch, bits, brightest):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    levels = np.linspace(0, brightest, 64).astype(np.uint16).reshape(8, 8)
    for part, darker in (("train", 1), ("train", 9), ("test", 2)):
        folder = tmp_path / part / "a"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels // darker).save(folder / f"{darker}.png")
        Image.new("RGB", (8, 8), (0, 99, 0)).save(folder / "plain.png")
    data = importlib.import_module("data").load_data(f"imagefolder:{tmp_path}", image_size=8)
    top = 2**bits - 1
    images = {int(image.max()): image for image in data.train_images}
    for darker in (1, 9):
        expected = torch.from_numpy((levels // darker).astype(int) * 255 // top).byte()
        assert torch.equal(images[int(expected.max())][0], expected)
    assert images[99].sum() == 99 * 64
    assert f"3 of 5 images grey of {bits} bits, 0 .. {top}, scaled to 0 .. 255" in data.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "imagefolder:PATH, got 'mnist'"),
        (["--train-size", "5000"], r"train size must be in 1 \.\. 1000"),
        (["--model", "wrn-15-1"], r"6 n \+ 4"),
        (["--model", "resnet"], "unknown model 'resnet'"),
    ],
)
def test_bad_arguments_are_named(run, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("train.py", "--out", tmp_path, *arguments)


def test_a_missing_folder_is_named(run):
    with pytest.raises(FileNotFoundError, match="no such directory or zip: nowhere"):
        run("train.py", "--data", "imagefolder:nowhere")


def test_train_is_a_command():
    command = [sys.executable, str(EXAMPLES / "train.py"), "--method", "magic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'magic'" in done.stderr


def test_every_variant_of_the_ablation(run, tmp_path):
    printed = run(
        "ablation.py", "--train-size", 70, "--epochs", 3, "--batch-size", 16, "--seeds", 2,
        "--out", tmp_path,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    names = {row["variant"] for row in rows}
    assert len(names) > 20
    assert len(rows) == 2 * len(names)
    assert all(f"| {name} | 2 |" in printed for name in names)
    learned = {row["variant"]: row["keep_probs"] for row in rows if "keep_probs" in row}
    moved = [max(abs(keep - 0.5) for keep in keeps.values()) for keeps in learned.values()]
    assert min(moved) > 1e-4


def test_toy_on_digits(run, tmp_path):
    run(
        "toy_split_mixture.py", "--data", "digits", "--seeds", 1, "--epochs", 4, "--net", "fc",
        "--out", tmp_path,
    )  # fmt: skip
    results = json.loads((tmp_path / "toy.json").read_text())
    assert {(row["net"], row["method"]) for row in results} == {("fc", "gar"), ("fc", "nslr")}
    gar = next(row for row in results if row["method"] == "gar")
    assert gar["noisy"] < gar["others"]
    assert (tmp_path / "toy.png").exists()


CIFAR10 = os.environ.get("OLA_AUGMENT_CIFAR10")


@pytest.mark.skipif(not CIFAR10, reason="OLA_AUGMENT_CIFAR10 names no zip of CIFAR-10")
def test_toy_experiment_on_cifar10(run, tmp_path):
    """Of a tenth of the images: GAR has begun to leave out the noisy split."""
    with zipfile.ZipFile(CIFAR10) as whole, zipfile.ZipFile(tmp_path / "some.zip", "w") as some:
        for name in whole.namelist()[::10]:
            some.writestr(name, whole.read(name))
    run(
        "toy_split_mixture.py", "--data", f"imagefolder:{tmp_path / 'some.zip'}", "--seeds", 1,
        "--epochs", 6, "--net", "fc", "--method", "gar", "--out", tmp_path,
    )  # fmt: skip
    [row] = json.loads((tmp_path / "toy.json").read_text())
    assert row["noisy"] < row["others"] - 0.05
    assert torch.tensor(row["usage"]).min() >= 0


def test_train_goes_on_where_it_was(run, tmp_path):
    options = ["--train-size", 40, "--batch-size", 10, "--epochs", 3, "--method", "ola", "--quiet"]

    def outcome(out):
        folder = out / "ola-seed0"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            del line["seconds"]
        accuracy = json.loads((folder / "result.json").read_text())["accuracy"]
        return accuracy, lines, (folder / "policy.json").read_text()

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run("train.py", *options, "--out", whole)
    run("train.py", *options, "--out", stopped)
    # A run that was stopped has its checkpoint and no result.
    (stopped / "ola-seed0" / "result.json").unlink()
    (stopped / "ola-seed0" / "policy.json").unlink()
    run("train.py", *options, "--out", stopped, "--resume")
    assert outcome(stopped) == outcome(whole)
    run("train.py", *options, "--out", stopped, "--resume")
    with pytest.raises(ValueError, match=r"needs the options of .*another --lr: 0\.05 t"):
        run("train.py", *options, "--lr", 0.1, "--out", stopped, "--resume")


def test_train_learns_by_values_from_held_out_images(run, tmp_path):
    printed = run(
        "train.py", "--data", "digits-rotated", "--train-size", 130, "--epochs", 6, "--method",
        "uniform", "ola", "--reference", "held-out", "--strength", "steered", "--learn-every", 2,
        "--learn-until", 0.5, "--quiet", "--out", tmp_path,
    )  # fmt: skip
    assert "| ola |" in printed
    assert "ola: one seed does not tell what it prefers from chance" in printed
    assert "reference held-out, strength steered, learning from every 2. pair" in printed
    records, uniform = (
        [
            json.loads(line)
            for line in (tmp_path / f"{name}-seed0/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("ola", "uniform")
    )
    assert [r["steps"] for r in records] == [r["steps"] for r in uniform]
    assert records[0]["draw_probs"] != records[2]["draw_probs"] == records[-1]["draw_probs"]
    assert records[-1]["reward_mean"] is None


def test_yardstick(run, tmp_path):
    common = ("--bed", "rotated", "--epochs", 2, "--oracles", tmp_path / "oracles.json")
    run("learning_signal.py", "oracle", "--seeds", 1, *common)
    known = json.loads((tmp_path / "oracles.json").read_text())
    assert len(known["rotated"]) == 19
    printed = run("learning_signal.py", "signal", "--seeds", 1, "--every", 1, *common)
    assert printed.count("| dot, ") == 8
    assert printed.count("| cosine, ") == 8


def test_comparison_goes_on_where_it_was(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    beds = importlib.import_module("beds")
    bed = dataclasses.replace(beds.BEDS["rotated"], epochs=4)
    monkeypatch.setitem(beds.BEDS, "rotated", bed)
    monkeypatch.setitem(beds.COST, "target", (0.5, 0.5))
    results = tmp_path / "results.jsonl"
    options = ("comparison.py", "--bed", "rotated", "--results", results)
    run(*options, "--seeds", 1, "--method", "none", "ola")
    printed = run(*options, "--seeds", 2, "--method", "none", "uniform")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = [(row["method"], row["seed"]) for row in rows]
    assert found == [("none", 0), ("ola", 0), ("uniform", 0), ("none", 1), ("uniform", 1)]
    assert [row["epochs"] for row in rows] == [2, 4, 2, 2, 2]
    assert {"strength", "t", "flat", "most"} <= rows[1].keys()
    head, _, row, mean = printed.splitlines()[-4:]
    assert head == "| bed | none | uniform | ola |"
    assert row.startswith("| rotated | ")
    assert mean.startswith("| mean of the 1 target domains | ")
    run("results_figures.py", "--results", results, "--out", tmp_path)
    assert (tmp_path / "compared.png").stat().st_size > 5000


def test_what_is_known_of_a_shifted_folder_is_of_all_classes(monkeypatch, tmp_path):
    """Its images lie class by class."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    beds = importlib.import_module("beds")
    for part, count in (("train", 4), ("test", 90)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / part / name / f"{i}.png")
    bed = dataclasses.replace(beds.BEDS["cifar-inverted"], train_size=None)
    data = bed.load({"cifar10": str(tmp_path)}, 0)
    assert data.reference is not None
    assert data.reference[1].bincount().min() > 16
    reds = torch.cat((data.reference[0], data.test_images))[:, 0, 0, 0]
    classes = torch.cat((data.reference[1], data.test_labels))
    for name in range(2):  # each image with its own class
        assert reds[classes == name].sort().values.tolist() == list(range(255 - 89, 256))


def test_the_default_is_the_recommended_setting(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train, recipe, data = (importlib.import_module(m) for m in ("train", "recipe", "data"))
    epochs = ["--epochs", "180"]
    options = train.parse_arguments(epochs)
    images = data.load_data("digits").subset(200, 0)
    batches, held_out = recipe.make_batches(images, options, 0, learns=True)
    pairs = 180 * len(batches) // 2
    made = [
        recipe.make_learner(
            torch.nn.Linear(1, 1),
            recipe.make_augment("wide_long", changed, torch.Generator()),
            batches,
            held_out,
            data.Preprocess(images, 0),
            changed,
            target_domain=True,
        )
        for changed in (options, train.parse_arguments([*epochs, "--control", "shuffled"]))
    ]
    told = OLALearner.recommended(torch.nn.Linear(1, 1), OLAAugment(strength=1), [(None,)], pairs)
    for learner in made:
        assert learner.reference == told.reference == "held out"
        for name in ("learn_pairs", "learn_every", "micro_batches", "rejoins"):
            assert getattr(learner, name) == getattr(told, name)
        for name in ("first", "length", "windows", "strength", "most"):
            assert getattr(learner.trial, name) == getattr(told.trial, name)
        assert learner.updater.explores
        assert learner.policy.strength == 1
    assert made[0].updater.reward is told.updater.reward
    assert made[1].updater.reward is recipe.shuffled


def test_strip(run, tmp_path):
    run("strip.py", "--epochs", 1, "--columns", 2, "--out", tmp_path / "strip.png")
    assert (tmp_path / "strip.png").stat().st_size > 5000


def test_what_was_learned_in_a_sentence(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    learned = importlib.import_module("train").learned
    policy = OLAPolicy(strength=1.0)
    names = [operation.name for operation in policy.space.operations]
    with torch.no_grad():
        policy.keep_logits[names.index("rotate")] = 3
        policy.keep_logits[names.index("invert")] = -4
    found = "ola learned to use: rotate ±67°; to avoid: invert (2 seeds)"
    assert learned([policy, policy]) == found
    nothing = "ola learned nothing that differs from chance (2 seeds)"
    assert learned([OLAPolicy(strength=1.0)] * 2) == learned([OLAPolicy()] * 2) == nothing
    # what seeds disagree on is chance
    assert learned([policy, OLAPolicy(strength=1.0)]) == nothing
    assert learned([policy]) == "ola: one seed does not tell what it prefers from chance"
