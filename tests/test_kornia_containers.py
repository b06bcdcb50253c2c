"""Our transforms in kornia's containers: image, mask, boxes and points in register."""

import copy
import pickle

import kornia.augmentation as K
import pytest
import torch
from images import crops
from test_transforms import GEOMETRY
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from ola_augment import (
    GARUpdater,
    OLAAugment,
    Operation,
    PolicyTransform,
    SearchSpace,
    TrivialAugment,
    UniformPolicy,
)
from ola_augment.kornia import PolicyAugmentation, operation, search_space

KEYS = ["input", "mask", "bbox_xyxy", "keypoints"]


def always(*operations, num_ops=1, **options):
    return PolicyTransform(UniformPolicy(SearchSpace(operations), num_ops, 1.0), **options)


def squares(batch):
    """Images of a white rectangle with its mask, box and middle."""
    image = torch.zeros(batch, 3, 48, 64)
    image[:, :, 10:20, 30:44] = 1
    # kornia's boxes end with the last pixel, and pixels lie at whole numbers.
    boxes = torch.tensor([[[30.0, 10.0, 43.0, 19.0]]]).repeat(batch, 1, 1)
    points = torch.tensor([[[36.5, 14.5]]]).repeat(batch, 1, 1)
    return image, image[:, :1].clone(), boxes, points


def assert_in_register(image, mask, boxes, points, slack=1.0):
    assert torch.equal(mask, (image[:, :1] > 0).to(mask))
    for i in range(len(image)):
        rows, columns = torch.nonzero(image[i, 0], as_tuple=True)
        if len(rows) < 130:  # cut off at the border
            continue
        left, top, right, bottom = boxes[i, 0].tolist()
        assert left - slack <= columns.min()
        assert columns.max() <= right + slack
        assert top - slack <= rows.min()
        assert rows.max() <= bottom + slack
        x, y = points[i, 0].tolist()
        assert abs(x - columns.float().mean()) < 1
        assert abs(y - rows.float().mean()) < 1


@pytest.mark.parametrize("op", GEOMETRY, ids=lambda op: op.name)
def test_data_keys_stay_in_register(op):
    sequence = K.AugmentationSequential(PolicyAugmentation(always(op)), data_keys=KEYS)
    given = squares(8)
    out = sequence(*given)
    assert not torch.equal(out[0], given[0])
    assert [value.shape for value in out] == [value.shape for value in given]
    assert_in_register(*out, slack=0.51)


def test_chains_of_operations_between_kornias_own_stay_in_register():
    augment = PolicyAugmentation(always(*GEOMETRY, num_ops=2))
    sequence = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.ImageSequential(augment, K.RandomVerticalFlip(p=0.5)),
        data_keys=KEYS,
    )
    for _ in range(4):
        assert_in_register(*sequence(*squares(16)))
    by_name = K.AugmentationSequential(augment, data_keys=None)
    image, mask, boxes, points = squares(4)
    out = by_name({"image": image, "mask": mask, "bbox_xyxy": boxes, "keypoints": points, "id": 7})
    assert out["id"] == 7
    assert_in_register(out["image"], out["mask"], out["bbox_xyxy"], out["keypoints"])


def test_images_masks_and_boxes_are_what_the_transform_itself_gives():
    transform = OLAAugment("wide_long", fill=0.5)
    augment = PolicyAugmentation(transform)
    images, masks = crops(20, 16, 24) / 255, torch.randint(0, 200, (20, 2, 16, 24))
    sequence = K.AugmentationSequential(augment, data_keys=["input", "mask"])
    out, moved = sequence(images, masks)
    assert torch.equal(out, transform.replay(images, augment.last_actions))
    assert moved.dtype == masks.dtype
    alone, parts = sequence(images, [mask.float() for mask in masks], params=sequence._params)
    assert torch.equal(alone, out)
    assert torch.equal(torch.cat([p.view(1, 2, 16, 24) for p in parts]), moved.float())


@pytest.mark.parametrize("container", [K.AugmentationSequential, K.ImageSequential])
def test_what_a_container_recorded_is_replayed_and_can_be_learned_from(container):
    transform = OLAAugment(generator=torch.Generator().manual_seed(0))
    augment = PolicyAugmentation(transform)
    assert augment.last_actions is None
    sequence = container(augment, K.RandomGaussianNoise(p=0.5))
    images = crops(16, 16, 16) / 255
    out = sequence(images)
    actions = augment.last_actions
    assert len({tuple(row) for row in actions.ops.tolist()}) > 8
    torch.rand(3)
    assert torch.equal(sequence(images, params=sequence._params), out)
    assert not torch.equal(sequence(images), out)
    GARUpdater(transform.policy).step(actions, torch.linspace(-1, 1, 16))
    assert transform.policy.keep_logits.abs().sum() > 0
    names = set(sequence.state_dict())
    assert any(name.endswith("augment.policy.keep_logits") for name in names)
    assert not list(augment.parameters())


def test_it_runs_alone_copied_pickled_and_in_workers():
    augment = PolicyAugmentation(OLAAugment(generator=torch.Generator().manual_seed(1)))
    images = crops(6, 16, 16) / 255
    twins = copy.deepcopy(augment), pickle.loads(pickle.dumps(augment))
    out = augment(images)
    assert all(torch.equal(twin(images), out) for twin in twins)
    assert augment(images[0]).shape == (1, 3, 16, 16)
    kept = PolicyAugmentation(OLAAugment(), keepdim=True)
    assert kept(images[0]).shape == (3, 16, 16)
    assert augment(images[:0]).shape == (0, 3, 16, 16)
    assert augment(images.double()).dtype == torch.float64
    loader = DataLoader(images, batch_size=3, num_workers=1, collate_fn=_Augmented(augment))
    assert [len(batch) for batch in loader] == [3, 3]


class _Augmented:
    def __init__(self, augment):
        self.augment = augment

    def __call__(self, samples):
        return self.augment(torch.stack(samples))


def test_same_on_batch_is_one_draw():
    augment = PolicyAugmentation(OLAAugment())
    sequence = K.AugmentationSequential(augment, same_on_batch=True)
    out = sequence((crops(1, 16, 16) / 255).expand(8, 3, 16, 16))
    assert all(torch.equal(field[:1].expand_as(field), field) for field in augment.last_actions)
    assert (out == out[:1]).all()


def test_inverse_moves_back_what_is_still_there():
    sequence = K.AugmentationSequential(
        PolicyAugmentation(always(*GEOMETRY, interpolation=InterpolationMode.BILINEAR)),
        data_keys=KEYS,
    )
    image, mask, boxes, points = squares(16)
    back = sequence.inverse(*sequence(image, mask, boxes, points))
    assert (back[0] - image).abs().mean() < 0.02
    assert (back[1] - mask).abs().mean() < 0.02
    torch.testing.assert_close(back[3], points, atol=1e-3, rtol=0)


def test_kornias_operations_carry_masks_boxes_and_points_too():
    image, mask, boxes, points = squares(8)
    moving = [o for o in search_space().operations if "r" in o.name[:1] or o.name[-2:-1] == "_"]
    assert len(moving) == 5
    for op in moving:
        sequence = K.AugmentationSequential(PolicyAugmentation(always(op)), data_keys=KEYS)
        for _ in range(3):
            out, moved, _, point = sequence(image, mask, boxes, points)
            # kornia interpolates: half a pixel either way at the border of the rectangle.
            inner, outer = out[:, :1] > 0.75, out[:, :1] > 0.01
            assert (moved.bool() | ~inner).float().mean() > 0.998, op.name
            assert (outer | ~moved.bool()).float().mean() > 0.998, op.name
            for i in range(8):
                rows, columns = torch.nonzero(moved[i, 0], as_tuple=True)
                if not 0 < rows.min() <= rows.max() < 47:  # cut off at the border
                    continue
                x, y = point[i, 0].tolist()
                assert abs(x - columns.float().mean()) < 1
                assert abs(y - rows.float().mean()) < 1


def test_an_unknown_geometry_is_refused_with_annotations_only():
    augment = PolicyAugmentation(always(operation(K.RandomPerspective())))
    images, masks = squares(2)[:2]
    assert K.ImageSequential(augment)(images).shape == images.shape
    skip = K.AugmentationSequential(augment, transformation_matrix_mode="skip")
    assert skip(images).shape == images.shape
    with pytest.raises(ValueError, match=r"RandomPerspective.*transformation_matrix_mode='skip'"):
        K.AugmentationSequential(augment, data_keys=["input", "mask"])(images, masks)


@pytest.mark.parametrize("nested", [False, True])
def test_the_transform_itself_is_refused_where_annotations_would_stay(nested):
    transform = OLAAugment()
    child = v2.Compose([transform]) if nested else transform
    child = K.ImageSequential(child) if nested else child
    image, mask, boxes, _ = squares(2)
    state = torch.random.get_rng_state()
    for keys, arguments in ((["mask"], [mask]), (["bbox_xyxy", "mask"], [boxes, mask])):
        sequence = K.AugmentationSequential(child, data_keys=["input", *keys])
        with pytest.raises(TypeError, match=rf"{keys[0]}.*PolicyAugmentation\(OLAAugment"):
            sequence(image, *arguments)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert transform.last_actions is None
    labelled = K.AugmentationSequential(child, data_keys=["input", "class"])
    assert labelled(image, torch.arange(2))[1].tolist() == [0, 1]
    assert K.ImageSequential(child)(image).shape == image.shape


@pytest.mark.parametrize("nested", [False, True])
def test_the_transform_itself_is_refused_where_a_draw_is_to_be_shared(nested):
    clips = torch.rand(1, 1, 3, 8, 8).expand(2, 4, 3, 8, 8)
    child = v2.Compose([TrivialAugment()]) if nested else TrivialAugment()
    video = K.VideoSequential(child, data_format="BTCHW")
    with pytest.raises(TypeError, match=r"each frame, though same_on_frame.*PolicyAugmentation"):
        video(clips)
    shared = K.ImageSequential(child, same_on_batch=True)
    with pytest.raises(TypeError, match=r"each image, though same_on_batch.*PolicyAugmentation"):
        shared(clips[0])
    frames = K.VideoSequential(child, data_format="BTCHW", same_on_frame=False)
    assert frames(clips).shape == clips.shape
    one = K.VideoSequential(PolicyAugmentation(TrivialAugment()), data_format="BTCHW")(clips)
    assert torch.equal(one, one[:, :1].expand_as(one))


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match="augment must be a PolicyTransform, got RandomInvert"):
        PolicyAugmentation(K.RandomInvert())
    with pytest.raises(TypeError, match=r"int64|dtype"):
        PolicyAugmentation(OLAAugment())(torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        PolicyAugmentation(OLAAugment())(torch.full((2, 3, 8, 8), 200.0))


def test_a_kernel_with_a_matrix_of_ones_own_is_followed():
    def shift(magnitudes, height, width):
        matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(magnitudes), 1, 1)
        matrix[:, 0, 2] = -magnitudes
        return matrix

    augment = PolicyAugmentation(always(Operation("shift", 4, 8, signed=True, matrix=shift)))
    assert_in_register(*K.AugmentationSequential(augment, data_keys=KEYS)(*squares(6)))
