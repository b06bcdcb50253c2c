"""What `examples/train.py` says: of the data, of mistakes, of what is left, and in the end."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def write(folder, parts=("train", "test"), classes=("a", "b"), count=2):
    for part in parts:
        for level, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20, 30, 3), 50 * level + i, np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


def test_the_data_are_described(tmp_path):
    from data import load_data
    from report import data_lines

    write(tmp_path, ("train", "test", "reference"), count=3)
    (tmp_path / "train" / "nothing").mkdir()
    for astray in ("train", "train/a/deeper"):
        (tmp_path / astray).mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(tmp_path / astray / "one.png")
    tags = Image.Exif()
    tags[0x0112] = 6
    lying = np.zeros((16, 32, 3), np.uint8)
    lying[:, 16:] = 255  # bright on the right: below, when it is turned
    Image.fromarray(lying).save(tmp_path / "train" / "a" / "turned.png", exif=tags)
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(
        tmp_path / "train" / "a" / "deep.png"
    )
    Image.new("L", (16, 16)).save(tmp_path / "train" / "a" / "grey.png")
    data = load_data(f"imagefolder:{tmp_path}", 16)
    text = data_lines(data, 5)
    assert "2 classes, 5 of 9 training, 6 test, 6 labelled images of the target domain" in text
    assert "16 x 16 pixels, colour" in text
    for note in (
        "19 of 21 images scaled and cropped to 16 x 16 (--image-size)",
        "1 of 21 images turned upright, as their orientation tag says",
        "1 of 21 images grey of 16 bits, 0 .. 65535, scaled to 0 .. 255",
        "1 of 21 images grey, made colour",
        "no images in train/nothing: left out",
        "1 image in train, which is no folder of a class: left out",
        "1 image in train/a/deeper, which is no folder of a class: left out",
    ):
        assert note in text.splitlines()
    archive = shutil.make_archive(f"{tmp_path}-packed", "zip", tmp_path)
    packed = load_data(f"imagefolder:{archive}", 16)
    assert data_lines(packed, 5).splitlines()[1:] == text.splitlines()[1:]
    upright = data.train_images[5]
    assert upright[:, :4].max() < 20
    assert upright[:, -4:].min() > 235
    assert data.classes == ("a", "b")


def test_every_image_is_read_or_said_to_be_left_out(tmp_path):
    from data import load_data

    write(tmp_path, ("train", "test", "reference"), count=3)
    for name in ("a", "b"):
        folder = tmp_path / "train" / name
        first = Image.open(folder / "0.png")
        more = [Image.new("RGB", first.size, "white")]
        first.save(folder / "0.gif", save_all=True, append_images=more)
        first.save(folder / "0.JFIF", format="jpeg")
        (folder / "phone.HEIC").write_bytes(b"unknown")
    (tmp_path / "train" / "labels").write_text("no ending")
    shutil.rmtree(tmp_path / "reference")
    (tmp_path / "reference").mkdir()
    archive = shutil.make_archive(f"{tmp_path}-packed", "zip", tmp_path)
    for source in (tmp_path, archive):
        data = load_data(f"imagefolder:{source}", 16)
        assert len(data.train_images) == 10
        for note in (
            "2 of 16 images with several frames or pages: the first is taken",
            "files that do not end as images do: 2 .heic, 1 without: left out",
            "no images in reference: left out",
        ):
            assert note in data.notes
    for file in (tmp_path / "test").rglob("*.png"):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"no images in test .*; files .*: 8 \.heic, 1 without"):
        load_data(f"imagefolder:{tmp_path}", 16)


def test_folders_of_classes_may_be_links(tmp_path):
    from data import load_data

    write(tmp_path / "real", ("train", "test"), count=3)
    (tmp_path / "linked" / "train").mkdir(parents=True)
    (tmp_path / "linked" / "test").symlink_to(tmp_path / "real" / "test")
    for name in ("a", "b"):
        (tmp_path / "linked" / "train" / name).symlink_to(tmp_path / "real" / "train" / name)
    (tmp_path / "real" / "train" / "a" / "back").symlink_to(tmp_path / "linked")
    real, linked = (load_data(f"imagefolder:{tmp_path / name}", 16) for name in ("real", "linked"))
    assert torch.equal(linked.train_images, real.train_images)
    assert linked.classes == real.classes


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    from data import load_data

    write(tmp_path / "photographs")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data("imagefolder:~/photographs", 16).name == "photographs"


def test_images_in_two_parts_are_said(tmp_path):
    from data import load_data

    write(tmp_path, ("train", "test", "reference"), count=3)
    for part, level in (("test", 200), ("reference", 230)):
        for number, file in enumerate(sorted((tmp_path / part).rglob("*.png"))):
            Image.new("RGB", (30, 20), (level + number,) * 3).save(file)
    assert not any("too: " in note for note in load_data(f"imagefolder:{tmp_path}", 16).notes)
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "test/b/another.png")
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "reference/b/name.png")
    notes = load_data(f"imagefolder:{tmp_path}", 16).notes
    assert [note.split(":")[0] for note in notes if "too: " in note] == [
        "1 of 7 test images are in train, too",
        "1 of 7 test images are in reference, too",
        "1 of 7 reference images are in train, too",
    ]


def test_what_is_no_image_or_zip_is_refused_in_words(tmp_path):
    from data import load_data

    (tmp_path / "images.tar").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"neither a directory nor a zip: .*images\.tar"):
        load_data(f"imagefolder:{tmp_path / 'images.tar'}")
    write(tmp_path / "images")
    (tmp_path / "images/train/a/0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png: Pillow knows no such format$"):
        load_data(f"imagefolder:{tmp_path / 'images'}")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "images/train/a/0.tiff")
    (tmp_path / "images/train/a/0.png").unlink()
    with pytest.raises(ValueError, match=r"mode F with levels 0\.0 .* store whole levels of 8 or"):
        load_data(f"imagefolder:{tmp_path / 'images'}")


def test_an_image_with_a_broken_tag_is_read_as_it_is(tmp_path):
    from collections import Counter

    from folders import _upright

    class Broken:
        def getexif(self):
            raise SyntaxError("not a TIFF file")

    image = Broken()
    assert _upright(image, Counter()) is image


def test_a_single_class_is_said(tmp_path):
    from data import load_data
    from report import data_lines

    write(tmp_path, classes=("images",))
    assert "every answer is right" in data_lines(load_data(f"imagefolder:{tmp_path}", 16))


def test_classes_of_very_different_size_are_said(tmp_path):
    from data import load_data
    from report import data_lines

    data = load_data("digits")
    assert data_lines(data).count("\n") == 0
    few = (data.train_labels != 3) | (torch.arange(len(data.train_labels)) < 100)
    data = dataclasses.replace(
        data, train_images=data.train_images[few], train_labels=data.train_labels[few]
    )
    assert "images a class differ: " in data_lines(data)


def test_help_names_all_data_and_defaults_without_importing_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", EXAMPLES / "train.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| torch\n" not in done.stderr
    for text in ("digits-noisy", "imagefolder:PATH", "(default: 32)", "(default: 100)"):
        assert text in done.stdout


def test_a_mistake_is_one_line(tmp_path):
    command = [sys.executable, EXAMPLES / "train.py", "--data", "imagefolder:nowhere"]
    done = subprocess.run(
        [*command, "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == "train.py: error: no such directory or zip: nowhere"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch-size", "0"], "--batch-size: must be a whole number of at least 1: 0"),
        (["--seeds", "-1"], "--seeds: must be a whole number of at least 1: -1"),
        (["--epochs", "ten"], "--epochs: must be a whole number of at least 1: ten"),
        (["--image-size", "1.5"], "--image-size: must be a whole number of at least 1: 1.5"),
        (["--strength", "lots"], "--strength: must be a number, tried, steered or learned: lots"),
    ],
)
def test_a_bad_option_is_two_short_lines(given, message, capsys):
    from options import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(given)
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    assert error.endswith(message)


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path):
    import train

    images = tmp_path / "images"
    write(images, ("train", "test", "reference"))
    out = tmp_path / "out"
    for given, message in (
        (["--data", str(images)], f"--data imagefolder:{images}"),
        (["--data", f"imagefolder:{images}", "--held-out", "1"], "--held-out is for data without"),
        (["--device", "nowhere"], "--device nowhere: "),
        (
            ["--meta-lr", "0.1"],
            "--meta-lr is of a policy that learns by gradients: give --st",
        ),
        (["--strength", "1", "--entropy-weight", "0.1"], "--entropy-weight is of a policy that"),
        (["--reference", "next"], "--strength tried needs --reference held-out, not next: give"),
        (["--train-size", "5000"], "train size must be in 1 .. 1000, got 5000"),
        (["--method", "none", "ola", "--held-out", "1000"], "1000 of 1000 training images are"),
        (["--method", "none", "ola", "--train-size", "1"], "1 of 1 training images are held out"),
        (["--model", "unknown"], "unknown model 'unknown'"),
        (["--model", "wrn-10-0"], "width of a WRN must be at least 1, got 0"),
        (["--lr", "-1"], "Invalid learning rate: -1.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            train.main([*given, "--out", str(out)])
    assert not out.exists()
    shutil.rmtree(images / "test")
    with pytest.raises(ValueError, match=r"no images in test of .*must hold train/CLASS/IMAGE and"):
        train.main(["--data", f"imagefolder:{images}", "--out", str(out)])


def test_all_broken_images_are_named_at_once(tmp_path):
    from data import load_data

    write(tmp_path, count=8)
    for index in range(6):
        (tmp_path / "train" / "a" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read") as told:
        load_data(f"imagefolder:{tmp_path}", 16)
    assert str(told.value).count("cannot read the image ") == 5
    assert str(told.value).endswith("; and 1 more")
    (tmp_path / "reference" / "c").mkdir(parents=True)
    (tmp_path / "test" / "a" / "0.png").rename(tmp_path / "reference" / "c" / "0.png")
    with pytest.raises(ValueError, match=r"reference of .* has classes that train lacks: c"):
        load_data(f"imagefolder:{tmp_path}", 16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("part", "name"), [("test", "val"), ("train", "Training")])
def test_a_part_of_another_name_is_said(tmp_path, part, name, packed):
    from data import load_data

    write(source := tmp_path / "images", ("train", "test"), count=1)
    (source / part).rename(source / name)
    if packed:
        source = Path(shutil.make_archive(str(source), "zip", tmp_path, "images"))
    with pytest.raises(ValueError, match=f"no images in {part} .*; {name}/ is there: rename it to"):
        load_data(f"imagefolder:{source}", 16)


def test_one_image_of_the_target_domain_is_one(tmp_path):
    from data import load_data
    from report import data_lines

    write(tmp_path, ("train", "test", "reference"), count=1)
    shutil.rmtree(tmp_path / "reference" / "b")
    text = data_lines(load_data(f"imagefolder:{tmp_path}", 16))
    assert "2 test, 1 labelled image of the target domain;" in text


def test_classes_without_test_images_are_said(tmp_path):
    from data import load_data
    from report import data_lines, listed

    write(tmp_path, ("train", "test", "reference"))
    shutil.rmtree(tmp_path / "test" / "b")
    shutil.rmtree(tmp_path / "reference" / "a")
    lines = data_lines(load_data(f"imagefolder:{tmp_path}", 16)).splitlines()
    assert "no test images of b" in lines
    assert "no reference images of a" in lines
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"


def test_a_run_too_short_for_a_trial_is_said_first():
    from report import too_short

    text = too_short(224, 64, 100)
    assert text.startswith("ola will augment nothing: 100 epochs of 3 steps are 150 pairs of steps")
    assert "in runs of 480 or more (--epochs 320); 1000 are better (--epochs 667)" in text
    assert too_short(224, 64, 319).startswith("ola will augment nothing: ")
    assert too_short(224, 64, 320).startswith("a short run for ola: 320 epochs of 3 steps are 480 ")
    assert too_short(224, 64, 666).startswith("a short run for ola: ")
    assert too_short(224, 64, 667) == ""
    assert "nothing: 1 epoch of 3 steps is 1 pair of steps, and" in too_short(224, 64, 1)
    assert "nothing: 2 epochs of 1 step are 1 pair of steps, and" in too_short(64, 64, 2)


def test_options_know_what_there_is():
    import options
    import recipe
    import shifts
    import train

    assert set(options.COMPARED) == set(train.METHODS)
    assert set(options.SHIFTS) == set(shifts.SHIFTS)
    assert set(options.CONTROLS) == set(recipe.CONTROLS)


def test_another_runs_folder_is_not_overwritten(tmp_path):
    import train

    given = ["--train-size", "20", "--batch-size", "10", "--epochs", "1", "--method", "none"]
    given += ["--quiet", "--out", str(tmp_path)]
    train.main(given)
    before = (tmp_path / "none-seed0" / "result.json").read_text()
    with pytest.raises(FileExistsError, match=r"another --lr: 0\.05 there, 0\.1 now"):
        train.main([*given, "--lr", "0.1"])
    assert (tmp_path / "none-seed0" / "result.json").read_text() == before
    train.main(given)  # the same command is the same run


def test_every_compared_method_may_take_turns_with_plain_batches(tmp_path):
    import train

    given = ["--train-size", "8", "--batch-size", "4", "--epochs", "1", "--quiet", "--interleave"]
    methods = ["none", "randaugment", "trivialaugment", "autoaugment", "uniform", "strength-2"]
    train.main([*given, "--method", *methods, "--out", str(tmp_path)])
    assert {path.parent.name for path in tmp_path.glob("*/result.json")} == {
        f"{name}-seed0" for name in methods
    }


def test_packages_are_looked_for_before_training(tmp_path, monkeypatch):
    import train

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'ola_augment"):
        train.main(["--epochs", "1", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_pass_over_few_images_has_as_many_steps_for_all_methods():
    from data import load_data
    from options import parse_arguments
    from recipe import make_batches

    data = load_data("digits").subset(32, 0)
    data = dataclasses.replace(data, reference=(data.test_images[:96], data.test_labels[:96]))
    options = parse_arguments([])
    for learns in (False, True):
        batches, _ = make_batches(data, options, 0, learns)
        assert [len(images) for images, _ in batches] == [64, 64]


def test_what_is_left_is_said():
    from report import duration, run_line

    assert [duration(seconds) for seconds in (44.6, 60, 125)] == ["45 s", "1 min 0 s", "2 min 5 s"]
    line = run_line("ola, seed 0", {"accuracy": 0.5, "seconds": 20.0}, 3, [20.0, 10.0])
    assert line == "ola, seed 0: 50.0 % in 20 s; 3 left, about 45 s"
    line = run_line("ola, seed 0", {"accuracy": 0.1, "seconds": 20.0, "skipped": 7}, 0, [20.0])
    assert line == "ola, seed 0: 10.0 % in 20 s; 7 steps skipped, not finite: try a lower --lr"


def test_one_image_a_class():
    from report import one_a_class

    labels = torch.tensor([2, 0, 0, 1, 2, 5])
    images, classes = one_a_class(torch.arange(6), labels)
    assert (images.tolist(), classes) == ([1, 3, 0, 5], [0, 1, 2, 5])
    images, classes = one_a_class(torch.arange(100), torch.arange(100), most=4)
    assert classes == [0, 25, 50, 75]


@pytest.mark.parametrize(
    ("ola", "none", "text"),
    [
        ([0.9, 0.91, 0.92], [0.8, 0.81, 0.82], "ola is ahead of none, the next best, by 10.0"),
        ([0.7, 0.71, 0.72], [0.9, 0.91, 0.92], "none is ahead of ola by 20.0 ± 0.0 points: "),
        ([0.8, 0.9, 0.7], [0.9, 0.7, 0.8], "ola ties with none"),
        ([0.8], [0.8], "ola is as good as none, the best of the others; one seed proves nothing"),
        ([0.8], [0.7], "ola is 10.0 points ahead of none, the best of the others; one seed proves"),
    ],
)  # fmt: skip
def test_the_verdict(ola, none, text):
    from report import verdict

    runs = {"none": [{"accuracy": a} for a in none], "ola": [{"accuracy": a} for a in ola]}
    assert verdict(runs).startswith(text)
    assert verdict({"ola": runs["ola"]}) == ""


def test_samples_and_lines_of_a_run(tmp_path, capsys):
    import train

    write(tmp_path / "images", count=8)
    train.main(
        ["--data", f"imagefolder:{tmp_path / 'images'}", "--epochs", "1", "--batch-size", "8",
         "--method", "uniform", "none", "--quiet", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("images: 2 classes, 16 training, 16 test; 32 x 32 pixels, colour\n")
    assert "uniform, seed 0: " in printed
    assert "; 1 left, about " in printed
    assert (tmp_path / "out" / "uniform-seed0" / "samples.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out/none-seed0/result.json").read_text())["seconds"] > 0


def test_the_chart_of_the_results(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    figures = importlib.import_module("results_figures")
    scores = {"none": (60.0, 62.0), "uniform": (61.0, 63.0), "ola": (90.0, 92.0)}
    rows = [
        {"bed": bed, "method": method, "seed": seed, "accuracy": score}
        for bed in ("cifar-1000", "rotated", "photographs-240")
        for method, pair in scores.items()
        for seed, score in enumerate(pair)
        if (bed, method) != ("photographs-240", "uniform")
    ]
    rows.append({"bed": "dark", "method": "ola", "seed": 0, "accuracy": 90.0})  # none is to come
    assert figures.in_order(rows) == ["photographs-240", "rotated", "cifar-1000"]
    figure = figures.compared(rows)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "ola", "uniform"]
    assert [text.get_text().strip() for text in axes.texts] == ["+30"] * 3  # clipped, with a number
    assert max(max(line.get_xdata()) for line in axes.lines) <= 15
    figure.savefig(tmp_path / "compared.png")
