"""torchvision's checks of its automatic augmentations, run against ours and theirs."""

import runpy
from pathlib import Path

import pytest
import torch
from images import crops
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf
from torchvision_contract import CHECKS, OURS, THEIRS, fails, summary

from ola_augment import Operation, PolicyTransform, RandAugment, SearchSpace, UniformPolicy

DOCS = Path(__file__).parents[1] / "docs"

#: What our transforms refuse on purpose; docs/torchvision.md says why.
REFUSED = {
    "`interpolation=BICUBIC` on PIL images",
    "`torch.jit.script` compiles it",
    "int16, int32 and int64 tensors",
}


@pytest.mark.parametrize("sentence", CHECKS)
@pytest.mark.parametrize("name", OURS)
def test_ours_pass_but_for_what_is_refused_on_purpose(name, sentence):
    if sentence in REFUSED:
        assert fails(CHECKS[sentence], OURS[name])
    else:
        CHECKS[sentence](OURS[name])


@pytest.mark.filterwarnings("ignore")
def test_the_documented_table_is_what_the_checks_find():
    generator = runpy.run_path(str(DOCS / "torchvision_table.py"))
    written = generator["TARGET"].read_text(encoding="utf-8")
    assert "{include} _torchvision_table.md" in (DOCS / "torchvision.md").read_text()
    if f"torchvision {generator['version']()} |" not in written:
        pytest.skip("the table describes another torchvision")
    rows = [line.strip("| \n").split(" | ") for line in written.splitlines()[2:]]
    assert [row[0] for row in rows] == list(CHECKS)
    for sentence, ours, theirs in rows:
        assert ours == ("no" if sentence in REFUSED else "yes")
        assert theirs == summary(sentence, THEIRS), sentence


def matrix(name, magnitude):
    return {
        "shear_x": (1, magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, magnitude, 1, 0),
        "translate_x": (1, 0, -magnitude, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -magnitude),
    }[name]


@pytest.mark.parametrize("magnitude", [0.3, -0.2, 0.0])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("mode", [InterpolationMode.NEAREST, InterpolationMode.BILINEAR])
@pytest.mark.parametrize("fill", [None, 7.0, (200, 3, 40)])
def test_shears_and_translations_are_those_of_autoaugment(name, magnitude, mode, fill):
    image = crops(1, 24, 32)[0]
    picture = tvf.to_pil_image(image)
    if name.startswith("translate"):
        magnitude *= 24
    pillow = Image.Resampling[mode.name]
    color = fill if isinstance(fill, tuple) else (int(fill or 0),) * 3
    whole = name.startswith("translate")
    moved = int(magnitude) if whole else magnitude
    # AutoAugment shears by the plain coefficient and moves towards larger coordinates.
    expected = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix(name, moved), pillow, fillcolor=color
    )
    signs = -1 if whole else 1  # our translate is Pillow's matrix: + leads the other way
    operation = Operation(name, signs * moved, signs * moved)
    ours = PolicyTransform(
        UniformPolicy(SearchSpace((operation,)), 1, 1.0), interpolation=mode, fill=fill
    )
    assert ours(picture).tobytes() == expected.tobytes()
    assert torch.equal(ours(image), tvf.pil_to_tensor(expected))
    theirs = v2.AutoAugment()
    for given in (picture, image):
        kind = "".join(part.title() for part in name.split("_"))
        out = theirs._apply_image_or_video_transform(
            given, kind, magnitude, mode, {type(given): fill}
        )
        out = out if isinstance(out, torch.Tensor) else tvf.pil_to_tensor(out)
        off = (out.double() - tvf.pil_to_tensor(expected)).abs().mean()
        assert off < (12 if mode is InterpolationMode.NEAREST else 5)


@pytest.mark.parametrize("num_ops", [-1, 1.1])
def test_a_number_of_operations_that_is_none(num_ops):
    for make in (RandAugment, v2.RandAugment):
        with pytest.raises((ValueError, TypeError), match="num_ops"):
            make(num_ops=num_ops)


def test_rand_augment_draws_its_operations_evenly():
    # Each of the 14 operations in about 1/14 of 1,400 draws: 100 +- 5 standard deviations.
    actions = RandAugment(num_ops=1).policy.sample(1400, torch.Generator().manual_seed(0))
    counts = torch.bincount(actions.ops[:, 0], minlength=14)
    assert (counts - 100).abs().max() < 5 * (1400 * 13 / 14**2) ** 0.5
