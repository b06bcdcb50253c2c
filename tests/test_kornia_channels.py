"""kornia's augmentations and containers on other images than those of three channels."""

import kornia.augmentation as K
import pytest
import torch
from images import crops

from ola_augment import OLAAugment, Operation, PolicyTransform, SearchSpace, UniformPolicy
from ola_augment.kornia import PolicyAugmentation, operation, search_space
from ola_augment.operations import apply_geometry_to_masks


def bands(count, channels, side=16):
    return crops(count * channels, side, side)[:, 0].reshape(count, channels, side, side) / 255


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_a_space_for_other_channels_leaves_out_what_cannot_take_them(channels):
    space = search_space(channels=channels)
    left_out = {o.name for o in search_space().operations} - {o.name for o in space.operations}
    assert left_out == {"color"}
    augment = PolicyTransform(UniformPolicy(space, 2, 1.0))
    images = bands(60, channels)
    result, actions = augment.augment(images)  # 120 operations of 15
    assert len(actions.ops.unique()) == len(space)
    assert result.shape == images.shape
    assert torch.equal(augment.replay(images, actions), result)


def test_what_cannot_take_the_channels_is_refused_by_name_whatever_is_drawn():
    augment = OLAAugment(search_space(), generator=torch.Generator().manual_seed(0))
    state = augment.generator.get_state()
    for images in (bands(2, 1), (bands(2, 1) * 255).byte(), bands(1, 5)[0]):
        channels = images.shape[-3]
        for _ in range(5):
            with pytest.raises(ValueError, match="RandomSaturation takes no images of") as caught:
                augment(images)
            assert f"search_space(channels={channels})" in str(caught.value)
    assert torch.equal(augment.generator.get_state(), state)
    assert augment(bands(2, 3)).shape == (2, 3, 16, 16)


def test_an_operation_is_tried_on_the_channels_that_it_is_for():
    saturation = K.RandomSaturation((0.1, 1.9))
    for channels in (1, 4):
        with pytest.raises(ValueError, match=f"RandomSaturation takes no images of {channels} "):
            operation(saturation, 0.1, 1.9, parameter="saturation_factor", channels=channels)
        with pytest.raises(ValueError, match="RandomSaturation takes no images"):
            operation(lambda m: K.RandomSaturation((m, m)), 0.1, 1.9, channels=channels)
    blur = operation(K.RandomGaussianBlur((3, 3), (0.1, 2.0)), channels=13)
    assert PolicyTransform(UniformPolicy(SearchSpace((blur,)), 1))(bands(2, 13)).shape[1] == 13
    with pytest.raises(ValueError, match="channels must be at least 1"):
        search_space(channels=0)
    with pytest.raises(TypeError, match="channels must be an int"):
        search_space(channels=1.0)


def test_a_kernel_of_ones_own_may_refuse_channels_too():
    class Swap:
        def __call__(self, images, _):
            return images.flip(1)

        def check_channels(self, channels):
            if channels != 3:
                raise ValueError(f"red and blue of {channels} channels")

    space = SearchSpace((Operation("identity"), Operation("swap", kernel=Swap())))
    augment = PolicyTransform(UniformPolicy(space, 1, 0.0))
    assert augment(bands(2, 3)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="red and blue of 4 channels"):
        augment(bands(2, 4))


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_containers_give_images_of_any_channels(channels):
    augment = PolicyAugmentation(OLAAugment())
    images, masks = bands(6, channels), (bands(6, 1) > 0.4).float()
    sequence = K.AugmentationSequential(augment, data_keys=["input", "mask"])
    result, moved = sequence(images, masks)
    actions = augment.last_actions
    assert result.shape == images.shape
    assert torch.equal(augment.augment.replay(images, actions), result)
    assert torch.equal(apply_geometry_to_masks(masks, augment.augment.space, actions), moved)
    patches = K.ImageSequential(PolicyAugmentation(OLAAugment()))(images)
    assert patches.shape == images.shape


def test_containers_give_images_of_another_range():
    augment = PolicyAugmentation(OLAAugment(value_range=(0.0, 1.6)))
    images = bands(6, 4) * 1.6
    result = K.AugmentationSequential(augment, data_keys=["input"])(images)
    assert torch.equal(augment.augment.replay(images, augment.last_actions), result)
    assert result.max() > 1.2
