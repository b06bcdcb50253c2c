"""timm's RandAugment strings, operation by operation and as distributions, and its loop's parts."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from ola_augment import Actions, OLAAugment, PolicyTransform
from ola_augment.integrations.timm import TimmRandAugmentPolicy

CONFIG = "rand-m9-mstd0.5-inc1"


def picture():
    generator = np.random.default_rng(0)
    smooth = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(smooth).resize((24, 20), Image.Resampling.BICUBIC))


def one(policy, operation, magnitude_bin, sign):
    """Actions of one image: this operation."""
    n = policy.max_ops
    actions = policy.sample(1)
    ops, keep = torch.full((1, n), operation), torch.zeros((1, n), dtype=torch.bool)
    keep[0, 0] = True
    bins = torch.full((1, n), magnitude_bin)
    signs = torch.full((1, n), sign, dtype=torch.int8)
    return actions._replace(ops=ops, keep=keep, magnitude_bins=bins, signs=signs)


@pytest.mark.parametrize("level", [0, 1, 5, 9, 10])
@pytest.mark.parametrize("inc", [0, 1])
def test_every_operation_is_timms(monkeypatch, level, inc):
    aa = pytest.importorskip("timm.data.auto_augment")
    policy = TimmRandAugmentPolicy(f"rand-m{level}-inc{inc}")
    transform = PolicyTransform(policy, fill=128)
    image = picture()
    names = aa.rand_augment_choices("", increasing=bool(inc))
    assert len(names) == len(policy.space)
    tables = policy.log_probs().magnitude.exp()
    for index, name in enumerate(names):
        bins = tables[index].nonzero().flatten().tolist()
        expected, found = set(), set()
        for sign in (-1, 1):
            monkeypatch.setattr(aa, "_randomly_negate", lambda v, sign=sign: sign * v)
            make = aa.LEVEL_TO_ARG[name]
            arguments = make(level, aa._HPARAMS_DEFAULT) if make else ()
            options = {"fillcolor": (128,) * 3, "resample": Image.Resampling.NEAREST}
            if arguments and name.startswith("Posterize") and arguments[0] == 0:
                result = np.zeros_like(image)  # Pillow 13 refuses 0 bits
            else:
                result = aa.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options)
            expected.add(np.asarray(result).tobytes())
            for k in bins:
                drawn = one(policy, index, k, sign if policy._signed[index] else 1)
                out = transform.replay(
                    torch.from_numpy(image.transpose(2, 0, 1).copy()), drawn.select(0)
                )
                found.add(out.numpy().transpose(1, 2, 0).tobytes())
        assert found == expected, name


def test_levels_are_distributed_as_timms():
    policy = TimmRandAugmentPolicy(CONFIG)
    masses = dict(
        zip(
            [o.name for o in policy.space.operations],
            policy.log_probs().magnitude.exp(),
            strict=True,
        )
    )
    levels = np.clip(np.random.default_rng(0).normal(9, 0.5, 200_000), 0, 10)
    grid = np.arange(201) / 20
    rotate = masses["rotate"].numpy()
    assert rotate.sum() == pytest.approx(1, abs=1e-5)
    assert rotate @ grid == pytest.approx(levels.mean(), abs=5e-3)
    assert rotate @ grid**2 == pytest.approx((levels**2).mean(), abs=0.1)
    assert rotate[-1] == pytest.approx((levels >= 9.975).mean(), abs=5e-3)
    color = masses["color"].numpy()
    assert color == pytest.approx(color[::-1])
    assert color @ np.abs(np.arange(201) - 100) / 10 == pytest.approx(levels.mean(), abs=2e-2)
    uniform = TimmRandAugmentPolicy("rand-m5-mstd101").log_probs().magnitude[3].exp()
    assert uniform[1:100].tolist() == pytest.approx([0.01] * 99)
    assert uniform[101:].sum() == 0


@pytest.mark.parametrize(
    "config",
    ["rand-m9-mstdinf", "rand-m15", "rand-m15-mmax6", "rand-m20-mstd101", "rand-m14-mstd3"],
)
def test_levels_that_timm_reads_in_its_own_way(config):
    aa = pytest.importorskip("timm.data.auto_augment")
    levels = []
    ops = aa.rand_augment_transform(config, {}).ops
    rotate = ops[3]
    rotate.prob, rotate.aug_fn = 1.0, lambda image, level, **_: levels.append(level)
    rotate.level_fn = lambda level, _: (level,)
    random.seed(0)
    for _ in range(4000):
        rotate(None)
    masses = TimmRandAugmentPolicy(config).log_probs().magnitude[3].exp().double().numpy()
    found, grid = np.array(levels), np.arange(201) / 20
    assert masses @ grid == pytest.approx(found.mean(), abs=0.15)
    assert masses[-1] == pytest.approx((found >= 9.975).mean(), abs=0.03)
    most = np.unique(found.round(2), return_counts=True)[1].max() / 4000
    assert masses.max() == pytest.approx(most, abs=0.03)


def test_create_transform_fills_and_resamples_as_the_guide_says():
    data = pytest.importorskip("timm.data")
    made = data.create_transform(32, is_training=True, auto_augment="rand-m9")
    (augment,) = (t for t in made.transforms if hasattr(t, "ops"))
    for op in augment.ops:
        assert op.kwargs["fillcolor"] == (124, 116, 104)
        assert op.kwargs["resample"] == Image.Resampling.BILINEAR
    advice = " ".join(TimmRandAugmentPolicy("rand-m9").approximations)
    assert "fill=(124, 116, 104)" in advice


def test_the_string_is_read():
    policy = TimmRandAugmentPolicy("rand-n3-p0.25-m7")
    actions = policy.sample(4000, torch.Generator().manual_seed(0))
    assert (actions.num_ops == 3).all()
    assert float(actions.keep.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert len(policy.approximations) == 2
    assert "mstd" in TimmRandAugmentPolicy(CONFIG).approximations[2]
    assert (TimmRandAugmentPolicy("rand-m9-mmax4").log_probs().magnitude[3].argmax()) == 80
    for everything in ("rand-m9-p0-n1", "rand-p1", "rand-m0-mstd0.5", "rand-mstdinf"):
        transform = PolicyTransform(TimmRandAugmentPolicy(everything))
        out, drawn = transform.augment(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
        assert isinstance(drawn, Actions)
        assert out.shape == (3, 3, 8, 8)
    space = TimmRandAugmentPolicy(CONFIG).space
    OLAAugment(space, interpolation=InterpolationMode.BILINEAR).augment(
        torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("augmix-m5", "begin with 'rand-'"),
        ("rand-m9-tweights", "'tweights'.*uniformly"),
        ("rand-t3a", "'t3a'"),
        ("rand-w0", "'w0'.*unknown; known are m, n, p, mstd, mmax, inc"),
        ("rand-m9.5", "'m9.5' .* no number"),
        ("rand-m3000", r"m of 'rand-m3000' must lie in 0 \.\. 1000, got 3000"),
        ("rand-mmax30", "mmax"),
        ("rand-n0", "n of"),
        ("rand-p1.5", "p of"),
        ("rand-", "section ''"),
        ("rand-m9-inc", "'inc'.*holds no number"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        TimmRandAugmentPolicy(config)


def test_what_is_no_string_is_refused():
    with pytest.raises(TypeError, match=r"config must be a str.*got None"):
        TimmRandAugmentPolicy(None)
