"""The batched kernels: uint8 equal to the exact ones, floats without rounding, any device."""

import kornia
import pytest
import torch
from batched_kernels import apply_batched
from images import assorted, crops, patterns
from pillow_reference import draw, one_operation
from test_operations_exact import GEOMETRIC, MODES, SPACES, every_draw, single
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ola_augment.actions import Actions
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions
from ola_augment.operations.program import program
from ola_augment.space import Operation, SearchSpace

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
WIDE_LONG = SPACES[1]


def batched(images: Tensor, space: SearchSpace, actions: Actions, bilinear=False, fill=(0, 0, 0)):
    """The batched kernels, also where uint8 on the CPU would take the exact ones."""
    height, width = images.shape[2:]
    fill = fill[: images.shape[1]]
    return apply_batched(images, program(space, height, width), actions, fill, bilinear)


def every_bin(space: SearchSpace, op: int, images: Tensor) -> tuple[Tensor, Actions]:
    """Some images, at least one, with every bin and sign of an operation."""
    draws = every_draw(space, op)
    pile = images[: 1 + 200 // len(draws)]
    actions = Actions.cat([one_operation(len(pile), op, *d, seed=d[0]) for d in draws])
    return pile.repeat(len(draws), 1, 1, 1), actions


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_uint8_equals_the_exact_kernels_at_every_bin(space: SearchSpace, device: str) -> None:
    for images in [*assorted(), *assorted(1)[:4]]:
        for op, operation in enumerate(space.operations):
            batch, actions = every_bin(space, op, images)
            for mode in MODES if operation.name in GEOMETRIC else MODES[:1]:
                expected = apply_actions(batch, space, actions, interpolation=mode)
                result = batched(batch.to(device), space, actions, mode is MODES[1])
                assert torch.equal(result.cpu(), expected), (operation.name, mode)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_uint8_chains_equal_the_exact_kernels(mode, device: str) -> None:
    for seed, space in enumerate(SPACES):
        for images in [crops(150, 32, 32), *assorted(), *assorted(1)]:
            actions = draw(space, len(images), 4, seed, keep_prob=0.7)
            fill = [255, 7, 100][: images.shape[1]]
            expected = apply_actions(images, space, actions, interpolation=mode, fill=fill)
            given = images.to(device)
            result = batched(given, space, actions, mode is MODES[1], fill)
            assert torch.equal(result.cpu(), expected)
            assert torch.equal(given.cpu(), images)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_whole_levels_as_floats_give_the_uint8_result_within_the_bound(space, device) -> None:
    for images in assorted():
        for op, operation in enumerate(space.operations):
            batch, actions = every_bin(space, op, images)
            for mode in MODES if operation.name in GEOMETRIC else MODES[:1]:
                bound = 1.0 if mode is MODES[1] else TABLE[operation.name].bound
                expected = apply_actions(batch, space, actions, interpolation=mode)
                floats = (batch / 255).to(device)
                result = apply_actions(floats, space, actions, interpolation=mode)
                assert result.min() >= 0
                assert result.max() <= 1
                difference = (result.cpu() * 255 - expected).abs().max()
                assert difference <= bound + 1e-3, (operation.name, mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_dtypes_are_computed_in_float32_or_better(dtype: torch.dtype) -> None:
    images = (crops(60, 16, 16) / 255).to(dtype)
    actions = draw(WIDE_LONG, 60, 3)
    result = apply_actions(images, WIDE_LONG, actions, fill=0.5)
    assert result.dtype == dtype
    computed = images.to(torch.promote_types(dtype, torch.float32))
    expected = apply_actions(computed, WIDE_LONG, actions, fill=0.5)
    assert torch.equal(result, expected.to(dtype))


def test_a_float_batch_stays_as_it_is_where_nothing_is_drawn() -> None:
    images = torch.rand(5, 3, 9, 8)
    before = images.clone()
    result = apply_actions(images, WIDE_LONG, draw(WIDE_LONG, 5, 2, keep_prob=0))
    assert torch.equal(result, before)
    assert result.data_ptr() != images.data_ptr()
    assert apply_actions(images[:0], WIDE_LONG, draw(WIDE_LONG, 0, 2)).shape == (0, 3, 9, 8)


def test_float_kernels_agree_with_kornia() -> None:
    images = torch.cat([crops(20, 24, 24), patterns(24, 24)]).double() / 255
    n = len(images)
    space = SearchSpace(
        tuple(o for o in WIDE_LONG.operations if TABLE[o.name].domain is None or o.low)
    )
    others = {
        "auto_contrast": lambda x, m: kornia.enhance.normalize_min_max(x),
        "equalize": lambda x, m: kornia.enhance.equalize(x + 1e-9),
        "invert": lambda x, m: kornia.enhance.invert(x),
        "flip_lr": lambda x, m: kornia.geometry.hflip(x),
        "flip_ud": lambda x, m: kornia.geometry.vflip(x),
        "solarize": lambda x, m: kornia.enhance.solarize(x, (m - 0.5) / 255),
        "brightness": lambda x, m: kornia.enhance.adjust_brightness_accumulative(x, m),
        "contrast": lambda x, m: kornia.enhance.adjust_contrast_with_mean_subtraction(x, m),
        "color": lambda x, m: kornia.enhance.adjust_saturation_with_gray_subtraction(x, m),
        "sharpness": lambda x, m: kornia.enhance.sharpness(x, m),
    }
    constant = (images.amax((2, 3)) == images.amin((2, 3))).any(1)
    for op, operation in enumerate(space.operations):
        if operation.name not in others:
            continue
        # Not the extrapolating half of the bins, where kornia's sharpness differs from Pillow's.
        for k in (0, 7, 14):
            magnitude = torch.full((n,), operation.magnitude(k, 31, 24, 24), dtype=torch.float64)
            expected = others[operation.name](images, magnitude)
            result = apply_actions(images, space, one_operation(n, op, k))
            # kornia makes constant channels black; its grey weights are rounded to three digits.
            use = ~constant if operation.name == "auto_contrast" else slice(None)
            error = (result - expected).abs()[use].max()
            assert error < 2e-3, operation  # half a grey level


#: Magnitudes at which an operation does something to an image of 6 x 7 pixels.
SOME = {"solarize": 100, "rotate": 33, "translate_x": 2.3, "translate_y": 2.3, "cutout": 3}
SMOOTH = [
    Operation(row.name, *([SOME.get(row.name, 0.6)] * 2 if row.domain else ()))
    for row in TABLE.values()
    if row.gradient
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", SMOOTH, ids=lambda operation: operation.name)
def test_gradients_with_respect_to_float_images(operation: Operation, mode) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 6, 7, generator=generator, dtype=torch.float64)
    images = (images * 0.8 + 0.1).requires_grad_()
    space, actions = single(operation)

    def apply(images: Tensor) -> Tensor:
        return apply_actions(images, space, actions, interpolation=mode)

    assert torch.autograd.gradcheck(apply, images)


def test_gradients_of_quantising_operations_are_zero_and_of_chains_finite() -> None:
    images = (crops(40, 16, 16) / 255).requires_grad_()
    for name in [row.name for row in TABLE.values() if not row.gradient]:
        op = [operation.name for operation in WIDE_LONG.operations].index(name)
        result = apply_actions(images, WIDE_LONG, one_operation(40, op, 15))
        (gradient,) = torch.autograd.grad(result.sum(), images)
        # A channel of few pixels in few levels is not equalized but left as it is.
        assert gradient[(result - images).abs() > 1e-6].abs().max() == 0, name
    result = apply_actions(images, WIDE_LONG, draw(WIDE_LONG, 40, 4))
    (gradient,) = torch.autograd.grad(result.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_does_not_change_the_result(device: str) -> None:
    def own(images: Tensor, magnitudes: Tensor) -> Tensor:
        mixed = torch.einsum("ij,njhw->nihw", torch.full((3, 3), 1 / 3, device=device), images)
        assert mixed.dtype == torch.float32
        return mixed

    space = SearchSpace((*WIDE_LONG.operations, Operation("mix", kernel=own)))
    images = (crops(64, 16, 16) / 255).to(device)
    actions = draw(space, 64, 4)
    expected = apply_actions(images, space, actions)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(apply_actions(images, space, actions), expected)


@pytest.mark.parametrize("make", [lambda: crops(16, 8, 8), lambda: crops(16, 8, 8) / 255])
def test_inside_a_compiled_training_step(make) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3 * 8 * 8, 5)
    actions = draw(WIDE_LONG, 16, 4)

    def forward(images: Tensor) -> Tensor:
        augmented = apply_actions(images * 1, WIDE_LONG, actions)
        return model(augmented.flatten(1).float()).square().mean()

    losses, gradients = [], []
    for step in (forward, torch.compile(forward, backend="eager")):
        loss = step(make())
        gradients.append(torch.autograd.grad(loss, model.weight)[0])
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


class Recorded(TorchDispatchMode):
    """Every operator that ran, and any index that is a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func.overloadpacket.__name__)
        indices = args[1] if func.overloadpacket.__name__.startswith("index") else ()
        if isinstance(indices, list | tuple) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in indices
        ):
            self.operators.add("boolean index")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("floating", [False, True])
def test_nothing_waits_for_the_device(mode, floating: bool) -> None:
    images = crops(200, 16, 16)
    images = images / 255 if floating else images
    actions = draw(WIDE_LONG, 200, 4)
    with Recorded() as recorded:
        batched(images, WIDE_LONG, actions, mode is MODES[1])
    assert recorded.operators & {"gather", "index_select"}
    waiting = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "bincount",
        "boolean index",
    }
    assert not recorded.operators & waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("floating", [False, True])
def test_no_host_synchronisation_on_cuda(mode, floating: bool) -> None:
    images = crops(200, 16, 16).cuda()
    images = images / 255 if floating else images
    actions = draw(WIDE_LONG, 200, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        apply_actions(images, WIDE_LONG, actions, interpolation=mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
