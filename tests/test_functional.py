"""Inside of the transforms of torch.func: what plain autograd gives, or a refusal."""

import pytest
import torch
from images import crops
from torch.func import grad, jvp, vjp, vmap

from ola_augment import OLAAugment, Operation, PolicyTransform, SearchSpace, UniformPolicy
from ola_augment.operations import apply_actions

# torch's own, when it first meets forward derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")

RGB = crops(6, 12, 13)
FLOATS = 0.1 + 0.8 * RGB / 255
OWN = Operation("own", 0.2, 0.8, kernel=lambda images, m: images * m.view(-1, 1, 1, 1))
OPERATIONS = (*SearchSpace.wide_long().operations, Operation("flip_lr"), OWN)


def always(*operations, **options):
    return PolicyTransform(UniformPolicy(SearchSpace(operations), 1, 1.0), **options)


def weighed(images):
    return (images * torch.linspace(0, 1, images.shape[-1])).pow(2).sum()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_derivatives_are_those_of_plain_autograd(operation):
    transform = always(operation)
    actions = transform.policy.sample(len(FLOATS))
    images = FLOATS.clone().requires_grad_()
    out = transform.replay(images, actions)
    (expected,) = torch.autograd.grad(weighed(out), images)
    for run in (
        lambda x: transform.replay(x, actions),
        lambda x: apply_actions(x, transform.space, actions),
    ):
        assert torch.equal(grad(lambda x: weighed(run(x)))(FLOATS), expected)  # noqa: B023
        value, pull = vjp(run, FLOATS)
        assert torch.equal(value, out.detach())
        towards, weights = torch.rand(2, *FLOATS.shape)
        value, moved = jvp(run, (FLOATS,), (towards,))
        assert torch.equal(value, out.detach())
        moved, pulled = (moved * weights).sum(), (pull(weights)[0] * towards).sum()
        torch.testing.assert_close(moved, pulled, rtol=1e-4, atol=1e-3)


def test_what_is_drawn_and_handed_over_inside_is_what_it_is_outside():
    transform = OLAAugment(generator=torch.Generator().manual_seed(3))

    def loss(weight, images, actions=None):
        if actions is None:
            images, actions = transform.augment(images)
        else:
            images = transform.replay(images, actions)
        return (weight * images.float()).sum(), (images, actions)

    weight = torch.ones(())
    for images in (RGB, FLOATS, RGB.to(torch.uint16)):
        size = torch.Size((11, 9))  # which no table was made for yet
        for given in (images, images[:1], images[..., : size[0], : size[1]]):
            _, (out, actions) = grad(loss, has_aux=True)(weight, given)
            floats = given.is_floating_point()  # whose kernels here are those for gradients
            outside = given.clone().requires_grad_(floats)
            assert torch.equal(out, transform.replay(outside, actions))
            _, (again, _) = grad(loss, has_aux=True)(weight, given, actions)
            assert torch.equal(again, out)
            twice = grad(lambda x: grad(lambda y: weighed(transform(y).float()))(x).sum())
            assert not floats or twice(given).shape == given.shape
    _, out = grad(lambda w, x: (w * 1, transform(x)), has_aux=True)(weight, RGB[0])
    assert out.shape == RGB[0].shape


def test_vmap_is_refused():
    transform = OLAAugment()
    _, actions = transform.augment(FLOATS)
    for run in (
        transform,
        lambda x: transform.replay(x, actions),
        lambda x: apply_actions(x, transform.space, actions),
        grad(lambda x: transform.replay(x, actions).sum()),
    ):
        with pytest.raises(TypeError, match=r"before vmap.*\(\.\.\., C, H, W\)"):
            vmap(run)(torch.stack([FLOATS, FLOATS]))
