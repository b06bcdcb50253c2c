"""What kornia's augmentations draw: judged by their parameters, each image's own, at any size."""

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from images import crops
from torchvision import tv_tensors

from ola_augment import PolicyTransform, SearchSpace, UniformPolicy
from ola_augment.integrations.kornia.draws import Draws, numbers
from ola_augment.kornia import PolicyAugmentation, operation, search_space
from ola_augment.operations import apply_actions, apply_geometry_to_masks

FLOATS = crops(6, 48, 40) / 255
SEEDS = np.arange(2000, dtype=np.uint64) << np.uint64(20)


def always(*operations):
    return PolicyTransform(UniformPolicy(SearchSpace(operations), 1, 1.0))


#: What noise of 32 x 32 pixels does not show.
HIDDEN = {
    "RandomClahe": {"clip_limit": (1.0, 4.0)},
    "RandomRotation": {"degrees": 1.0, "resample": "nearest"},
    "RandomTranslate": {"translate_x": (0.0, 0.01), "resample": "nearest"},
    "RandomAffine": {"degrees": 2.0, "resample": "nearest"},
    "RandomShear": {"shear": 2.0, "resample": "nearest"},
    "RandomSnow": {"snow_coefficient": (0.1, 0.9), "brightness": (1.5, 2.5)},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_small_noise_does_not_show_is_drawn_for_each_image_and_replayed(name):
    made = operation(getattr(K, name)(**HIDDEN[name]))
    assert made.random
    augment = always(made)
    image = crops(1, 96, 128) / 255
    images = image.expand(12, 3, 96, 128)
    result, actions = augment.augment(images)
    assert len(torch.unique(result.flatten(1), dim=0)) > 1
    assert torch.equal(augment.replay(images, actions), result)
    alone = augment.replay(image[0], actions.select(7))
    torch.testing.assert_close(alone, result[7], atol=1e-5, rtol=0)
    if made.matrix is None:
        with pytest.raises(ValueError, match="geometry is unknown"):
            apply_geometry_to_masks(torch.ones(12, 96, 128), augment.policy.space, actions)


MOVED = {
    "shear": (K.RandomShear((0.0, 0.0), resample="nearest"), 40, "shear_x"),
    "aligned": (K.RandomShear((0.0, 0.0), resample="nearest", align_corners=True), 40, "shear_y"),
    "translate": (K.RandomTranslate((0.0, 0.1), resample="nearest"), 9.2, "translate_x"),
    "rotate": (K.RandomRotation(1.0, resample="nearest"), 50, "degrees"),
    "affine": (K.RandomAffine(0.0, resample="nearest"), 50, "angle"),
}


@pytest.mark.parametrize("name", MOVED)
def test_masks_go_where_the_image_goes(name):
    augmentation, high, parameter = MOVED[name]
    augment = always(operation(augmentation, 0, high, parameter=parameter, signed=True))
    for height, width in ((48, 40), (100, 224)):
        rows = torch.arange(1, height * width + 1.0).view(1, 1, height, width) / (height * width)
        images = rows.expand(8, 1, height, width)
        result, actions = augment.augment(images)
        masks = apply_geometry_to_masks(images, augment.policy.space, actions)
        assert (result != masks).double().mean() < 0.01


@pytest.mark.parametrize(
    "augmentation",
    [K.RandomGaussianBlur((65, 65), (5.0, 9.0)), K.CenterCrop((224, 224)), K.RandomRain()],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_augmentations_for_larger_images_are_tried_on_them(augmentation):
    augment = always(operation(augmentation))
    images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    result, actions = augment.augment(images)
    assert torch.equal(augment.replay(images, actions), result)


def test_what_is_erased_is_erased_in_masks_too():
    augment = always(operation(K.RandomErasing(scale=(0.1, 0.4))))
    images = torch.full((16, 3, 24, 40), 0.5)
    result, actions = augment.augment(images)
    masks = torch.full((16, 24, 40), 3, dtype=torch.uint8)
    moved = apply_geometry_to_masks(masks, augment.policy.space, actions)
    assert torch.equal(moved == 0, result[:, 0] == 0)
    assert 0.1 < (moved == 0).double().mean() < 0.5
    assert set(moved.unique().tolist()) == {0, 3}
    ignored = apply_geometry_to_masks(masks, augment.policy.space, actions, fill=255)
    assert torch.equal(ignored == 255, moved == 0)
    image, mask = augment(tv_tensors.Image(images[0]), tv_tensors.Mask(masks[0]))
    assert torch.equal(mask == 0, image[0] == 0)
    container = K.AugmentationSequential(PolicyAugmentation(augment), data_keys=["input", "mask"])
    image, mask = container(images, torch.ones(16, 1, 24, 40))
    assert torch.equal(mask == 0, image[:, :1] == 0)
    sizes = always(operation(lambda m: K.RandomErasing(scale=(m, m)), 0.05, 0.3))
    result, actions = sizes.augment(images)
    moved = apply_geometry_to_masks(masks, sizes.policy.space, actions)
    assert torch.equal(moved == 0, result[:, 0] == 0)


def test_images_that_share_what_kornia_draws_once_are_run_together():
    made = operation(K.ColorJitter(0.3, 0.3, 0.3, 0.2))
    calls = []
    apply, kernel = made.kernel.apply, made.kernel
    augment = always(made)
    images = (crops(1, 24, 40) / 255).expand(200, 3, 24, 40)
    augment.augment(images[:1])
    kernel.apply = lambda images, params: calls.append(len(images)) or apply(images, params)
    result, actions = augment.augment(images)
    assert sum(calls) == 200
    assert 12 <= len(calls) <= 24  # orders of four functions
    for i in (0, 77, 199):
        torch.testing.assert_close(augment.replay(images[i], actions.select(i)), result[i])


@pytest.mark.parametrize("name", ["rotate", "posterize", "color", "shear_x", "auto_contrast"])
def test_where_the_magnitude_is_all_that_is_random_nothing_is_drawn(name):
    space = search_space()
    op = [operation.name for operation in space.operations].index(name)
    kernel = space.operations[op].kernel
    augment = PolicyTransform(UniformPolicy(SearchSpace((space.operations[op],)), 1, 1.0))
    augment(FLOATS)
    kernel.draw = None
    result, actions = augment.augment(FLOATS)
    for i in range(6):
        torch.testing.assert_close(augment.replay(FLOATS[i], actions.select(i)), result[i])


class Weather(K.IntensityAugmentationBase2D):
    """Draws for large images alone, or as no one foresaw."""

    def __init__(self, large=50, unknown=False):
        super().__init__(p=1.0)
        self.large, self.unknown = large, unknown

    def generate_parameters(self, shape):
        if self.unknown:
            return {"factor": torch.multinomial(torch.ones(shape[0], 9), 1)[:, 0] / 9}
        factor = torch.rand(shape[0]) if shape[-1] > self.large else torch.full((shape[0],), 0.5)
        return {"factor": factor}

    def apply_transform(self, input, params, flags, transform=None):
        return input * params["factor"].view(-1, 1, 1, 1)


def test_what_is_found_out_too_late_or_cannot_be_replayed_is_refused():
    augment = always(operation(Weather()))
    assert torch.equal(augment(FLOATS), FLOATS * 0.5)
    large = torch.rand(2, 3, 64, 60)
    with pytest.raises(ValueError, match=r"Weather draws .* 64 x 60.*pass size=\(64, 60\)"):
        augment(large)
    told = always(operation(Weather(), size=(64, 60)))
    result, actions = told.augment(large)
    assert torch.equal(told.replay(large, actions), result)
    with pytest.raises(ValueError, match=r"Weather.*draws by torch's aten::multinomial"):
        operation(Weather(unknown=True))


def test_torchs_own_generators_are_left_alone():
    augment = always(operation(K.RandomErasing()), operation(K.RandomPlasmaBrightness()))
    state = torch.random.get_rng_state()
    augment.generator = torch.Generator().manual_seed(0)
    augment(FLOATS)
    assert torch.equal(torch.random.get_rng_state(), state)


CALLS = {
    "rand": (lambda n: torch.rand(n, 8), 0.5, 1 / 12),
    "rand_like": (lambda n: torch.rand_like(torch.empty(n, 8)), 0.5, 1 / 12),
    "uniform_": (lambda n: torch.empty(n, 8).uniform_(-2, 4), 1.0, 3.0),
    "randn": (lambda n: torch.randn(n, 8), 0.0, 1.0),
    "normal_": (lambda n: torch.empty(n, 8).normal_(3, 2), 3.0, 4.0),
    "normal": (lambda n: torch.normal(torch.ones(n, 8), 2 * torch.ones(n, 8)), 1.0, 4.0),
    "bernoulli": (lambda n: torch.bernoulli(torch.full((n, 8), 0.3)), 0.3, 0.21),
    "bernoulli_": (lambda n: torch.empty(n, 8).bernoulli_(0.3), 0.3, 0.21),
    "randint": (lambda n: torch.randint(3, 8, (n, 8)), 5.0, 2.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_image_draws_its_own_numbers_as_torchs_are_distributed(name):
    call, mean, variance = CALLS[name]
    with Draws(SEEDS):
        drawn = call(len(SEEDS))
    assert drawn.dtype == call(2).dtype
    values = drawn.double()
    error = (variance / values.numel()) ** 0.5
    assert abs(values.mean() - mean) < 4 * error
    assert abs(values.var() - variance) < 6 * error * max(variance**0.5, 1)
    centred = values - values.mean(0)
    between = (centred.T @ centred / len(SEEDS) / variance).fill_diagonal_(0)
    neighbours = (centred[1:] * centred[:-1]).mean() / variance
    assert between.abs().max() < 6 / len(SEEDS) ** 0.5
    assert abs(neighbours) < 6 / values.numel() ** 0.5
    for i in (0, 5):
        with Draws(SEEDS[i : i + 1]):
            assert torch.equal(call(1)[0], drawn[i])


def test_permutations_and_calls_differ():
    orders = []
    for i in range(200):
        with Draws(SEEDS[i : i + 1]):
            orders.append(tuple(torch.randperm(3).tolist()))
    assert len(set(orders)) == 6
    first, second = numbers(SEEDS, 0, 1), numbers(SEEDS, 1, 1)
    assert abs(torch.corrcoef(torch.stack((first[:, 0], second[:, 0])))[0, 1]) < 0.1
    assert float(first.float().max()) < 1
    with Draws(SEEDS[:3]), pytest.raises(LookupError):
        torch.rand(2)


def test_a_kernel_of_ones_own_may_take_pixels_away():
    from ola_augment import Operation

    class Half:
        erases = True

        def __call__(self, images, magnitudes):
            gone = self.erased(magnitudes, None, *images.shape[2:])
            return images.masked_fill(gone[:, None], 0)

        def erased(self, magnitudes, centers, height, width):
            return torch.arange(width) < (magnitudes.view(-1, 1, 1) * width).expand(-1, height, 1)

    space = SearchSpace((Operation("half", 0, 0.5, kernel=Half(), matrix=stay),), 3)
    drawn = UniformPolicy(space, 1, 1.0).sample(8, torch.Generator().manual_seed(0))
    images = torch.ones(8, 1, 6, 8)
    result = apply_actions(images, space, drawn)
    assert torch.equal(apply_geometry_to_masks(images, space, drawn), result)
    assert set(result.mean((1, 2, 3)).tolist()) == {1.0, 0.75, 0.5}

    for wrong in (lambda gone: gone[0], torch.Tensor.float, lambda gone: gone.numpy()):

        class Wrong(Half):
            def erased(self, *arguments, wrong=wrong):
                return wrong(super().erased(*arguments))

        space = SearchSpace((Operation("half", 0, 0.5, kernel=Wrong(), matrix=stay),), 3)
        with pytest.raises(TypeError, match=r"erased of the kernel of operation 'half'.*\(8, 6, 8"):
            apply_geometry_to_masks(images, space, drawn)


def stay(magnitudes, height, width):
    return torch.eye(2, 3).expand(len(magnitudes), 2, 3)
