"""One image per call: Pillow's own functions, and nothing made that was not drawn."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from images import assorted, crops, patterns
from PIL import ImageFilter, ImageOps
from pillow_reference import draw, pillow_apply, pillow_chains, to_pil

from ola_augment import (
    Actions,
    OLAAugment,
    Operation,
    RandAugment,
    SearchSpace,
    TrivialAugment,
    UniformAugment,
    UniformPolicy,
)
from ola_augment.kernels import pillow
from ola_augment.operations import apply_actions, compile_kernels
from ola_augment.operations.program import program
from ola_augment.transforms import PolicyTransform

TRANSFORMS = [OLAAugment, RandAugment, TrivialAugment]


def sizes():
    return [(h, w) for h in range(1, 8) for w in range(1, 8)] + [(32, 32), (33, 100)]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_stands_for_pillows_functions_equals_them(mode, small, monkeypatch):
    monkeypatch.setattr(pillow, "_is_small", lambda image: small)
    for height, width in sizes():
        for image in patterns(height, width, seed=height)[::3].numpy():
            picture = to_pil(image).convert(mode)
            for ours, theirs in (
                (pillow.smooth, lambda picture: picture.filter(ImageFilter.SMOOTH)),
                (pillow.blur, lambda picture: picture.filter(ImageFilter.BLUR)),
                (pillow.auto_contrast, ImageOps.autocontrast),
                (pillow.equalize, ImageOps.equalize),
            ):
                assert ours(picture).tobytes() == theirs(picture).tobytes(), picture.size


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_come_back(channels):
    for batch in assorted(channels):
        for image in batch[:2].numpy():
            picture = pillow.from_array(image)
            assert picture.mode == ("L" if channels == 1 else "RGB")
            back = pillow.to_array(picture)
            assert np.array_equal(back, image)
            assert back.flags.c_contiguous
            assert not np.shares_memory(back, image)


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_equal_pillow_and_tensors(kind, channels):
    images = [image for batch in assorted(channels) for image in batch[:3]]
    for seed, image in enumerate(images):
        augment = kind(generator=torch.Generator().manual_seed(seed), fill=[3, 90, 255][:channels])
        picture = to_pil(image.numpy())
        before = picture.tobytes()
        result = augment(picture)
        actions = augment.last_actions
        assert actions.ops.ndim == 1
        fill = (3, 90, 255) if channels == 3 else 3
        batched = type(actions)(*(field[None] for field in actions))
        (expected,) = pillow_chains([picture], augment.space, batched, fill=fill)
        assert (result.mode, result.size) == (picture.mode, picture.size)
        assert result.tobytes() == expected.tobytes()
        assert picture.tobytes() == before
        replayed = augment.replay(image, actions)
        assert np.array_equal(replayed.numpy(), pillow.to_array(result))


def test_sixty_sizes_make_no_tables():
    augment = TrivialAugment()
    made = program.cache_info().misses
    for side in range(20, 80):
        image = torch.randint(0, 256, (3, side, side + 1), dtype=torch.uint8)
        assert augment(image).shape == image.shape
        assert augment(to_pil(image.numpy())).size == (side + 1, side)
    assert program.cache_info().misses == made


def test_ones_own_kernel_and_matrix_on_a_picture():
    def darken(images, magnitudes):
        return images * magnitudes.view(-1, 1, 1, 1)

    def shift(magnitudes, height, width):
        row = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
        matrices = row.repeat(len(magnitudes), 1, 1)
        matrices[:, 0, 2] = magnitudes
        return matrices

    space = SearchSpace(
        (
            Operation("darken", 0.2, 0.9, kernel=darken),
            Operation("shift", -3, 3, integer=True, matrix=shift),
        )
    )
    images = crops(12, 20, 24)
    actions = draw(space, 12, 2)
    together = apply_actions(images, space, actions)
    for i in range(12):
        alone = apply_actions(images[i : i + 1], space, actions.select([i]))
        assert torch.equal(alone[0], together[i])


def test_a_magnitude_that_this_size_pushes_out_is_refused_though_not_drawn():
    space = SearchSpace(
        (Operation("identity"), Operation("translate_x", 0, 9e5, side="width", per=32))
    )
    nothing = draw(space, 1, 1, keep_prob=0)
    images = torch.zeros(1, 1, 8, 320, dtype=torch.uint8)
    with pytest.raises(ValueError, match="accepts magnitudes"):
        apply_actions(images, space, nothing)


def test_files_that_were_not_loaded_yet(tmp_path):
    to_pil(crops(1, 32, 32)[0].numpy()).save(tmp_path / "image.jpg")
    augment = TrivialAugment(generator=torch.Generator().manual_seed(0))
    lazily = PIL.Image.open(tmp_path / "image.jpg")
    result = augment(lazily)
    again = TrivialAugment(generator=torch.Generator().manual_seed(0))
    assert result.tobytes() == again(lazily.copy()).tobytes()


def test_spaces_of_one_name_and_size_are_told_apart():
    for high in (2.0, 3.0):
        space = SearchSpace((Operation("brightness", high, high),))
        images = torch.full((2, 1, 4, 4), 50, dtype=torch.uint8)
        for batch in (images, images[:1]):
            result = apply_actions(batch, space, draw(space, len(batch), 1))
            assert (result == 50 * high).all()


def test_gradients_are_off_and_nothing_is_shared():
    augment = OLAAugment(generator=torch.Generator().manual_seed(0))
    image = crops(1, 16, 16)[0]
    before = image.clone()
    for _ in range(20):
        out = augment(image)
        out.fill_(0)
        assert not augment.last_actions.log_prob.requires_grad
    assert torch.equal(image, before)
    assert isinstance(augment, PolicyTransform)


@pytest.mark.parametrize("side", [17, 70])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_in_any_memory_and_pil_images_come_out_as_from_pillow(side, channels):
    compile_kernels()
    space = SearchSpace.wide_long()
    augment = PolicyTransform(UniformPolicy(space, num_ops=4))
    augment.generator = torch.Generator().manual_seed(0)
    planes = crops(1, side, side + 3)[0, :channels]
    array = np.ascontiguousarray(planes.permute(1, 2, 0).numpy())
    mirrored = np.ascontiguousarray(array[:, ::-1])[:, ::-1]
    frozen = array.copy()
    frozen.flags.writeable = False
    picture = PIL.Image.fromarray(array[..., 0] if channels == 1 else array)
    picture.info["note"] = "kept"
    for _ in range(12):
        state = augment.generator.get_state()
        for given in (array, mirrored, frozen, picture, planes):
            augment.generator.set_state(state)
            result = augment(given)
            actions = Actions(*(field[None] for field in augment.last_actions))
            expected = pillow_apply(planes[None], space, actions)[0]
            if isinstance(given, torch.Tensor):
                assert torch.equal(result, expected)
                continue
            shown = np.asarray(result)
            shown = shown[..., None] if shown.ndim == 2 else shown
            assert np.array_equal(shown, expected.permute(1, 2, 0).numpy())
            if given is picture:
                assert (result.mode, result.info) == (picture.mode, {"note": "kept"})
            else:
                assert result.flags.writeable
                assert not np.shares_memory(result, given)


def test_what_is_known_of_a_kind_of_image_holds_for_that_kind_and_policy_alone():
    augment = PolicyTransform(UniformPolicy("wide_long"))
    planes = torch.zeros(3, 40, 40, dtype=torch.uint8)
    augment(planes)
    with pytest.raises(TypeError, match="sparse"):
        augment(planes.to_sparse())

    class Two:
        def __call__(self, images, _):
            return images

        def check_channels(self, channels):
            raise ValueError(f"two bands, not {channels}")

    augment.policy = UniformPolicy(SearchSpace((Operation("two", kernel=Two()),)), 1)
    with pytest.raises(ValueError, match="two bands, not 3"):
        augment(planes)
    for side in range(1, 300):
        augment.policy = UniformPolicy("wide_long")
        assert augment(np.zeros((side, 2, 3), np.uint8)).shape == (side, 2, 3)
    assert len(augment._seen) <= 256
    assert not pickle.loads(pickle.dumps(augment))._seen


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_batch_in_channels_last_memory_comes_out_as_one_in_planes(channels):
    images = torch.randint(0, 256, (40, channels, 24, 17), dtype=torch.uint8)
    outputs = []
    for memory in (torch.contiguous_format, torch.channels_last):
        augment = UniformAugment(generator=torch.Generator().manual_seed(0))
        given = images.clone().contiguous(memory_format=memory)
        outputs.append(augment.augment(given)[0])
        assert torch.equal(given, images)
    assert torch.equal(*outputs)
