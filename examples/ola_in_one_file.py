"""OLA (Müller, Biedenkapp and Hutter, arXiv 2102.03275) in one file of plain torch and Pillow.

For readers of the paper: Algorithm 2 draws, Pillow applies, vmap of grad gives the gradient of
every example, equation 1 their rewards, equation 3 the update of the policy. The package computes
the same without per-example gradients, and draws and applies in compiled loops; a test holds the
two against each other. Run it with `python examples/ola_in_one_file.py`.
"""

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import nn
from torch.func import functional_call, grad, vmap
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

BINS = 31
MAX_OPS = 4


def affine(*matrix):
    return lambda image, *_: image.transform(image.size, Image.Transform.AFFINE, matrix)


def cutout(image, side, center):
    """A black square, clipped at the border."""
    pixels = pil_to_tensor(image)
    size = pixels.shape[1:]
    y, x = (int(c * s) - int(side) // 2 for c, s in zip(center, size, strict=True))
    pixels[:, max(y, 0) : max(y + int(side), 0), max(x, 0) : max(x + int(side), 0)] = 0
    return to_pil_image(pixels)


def enhance(kind):
    return 0.01, 2.0, False, False, lambda image, m, _: kind(image).enhance(m)


def shift(axis):
    """By pixels of a 32 x 32 image."""
    return 0, 32, True, True, lambda image, m, _: affine(*axis(m))(image)


# The search space WideLong: (lowest magnitude, highest, truncated to whole numbers, random sign,
# (image, magnitude, centre) -> image), magnitudes in steps from bin 0 to bin 30.
OPERATIONS = {
    "identity": (0, 0, False, False, lambda image, *_: image),
    "auto_contrast": (0, 0, False, False, lambda image, *_: ImageOps.autocontrast(image)),
    "equalize": (0, 0, False, False, lambda image, *_: ImageOps.equalize(image)),
    "rotate": (0, 135, True, True, lambda image, m, _: image.rotate(m)),
    "solarize": (256, 0, True, False, lambda image, m, _: ImageOps.solarize(image, m)),
    "color": enhance(ImageEnhance.Color),
    "posterize": (8, 2, True, False, lambda image, m, _: ImageOps.posterize(image, m)),
    "contrast": enhance(ImageEnhance.Contrast),
    "brightness": enhance(ImageEnhance.Brightness),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "shear_x": (0, 0.99, False, True, lambda image, m, _: affine(1, m, 0, 0, 1, 0)(image)),
    "shear_y": (0, 0.99, False, True, lambda image, m, _: affine(1, 0, 0, m, 1, 0)(image)),
    "translate_x": shift(lambda m: (1, 0, m, 0, 1, 0)),
    "translate_y": shift(lambda m: (1, 0, 0, 0, 1, m)),
    "blur": (0, 0, False, False, lambda image, *_: image.filter(ImageFilter.BLUR)),
    "invert": (0, 0, False, False, lambda image, *_: ImageOps.invert(image)),
    "flip_lr": (0, 0, False, False, lambda image, *_: ImageOps.mirror(image)),
    "flip_ud": (0, 0, False, False, lambda image, *_: ImageOps.flip(image)),
    "cutout": (0, 19.2, True, False, cutout),
}
TABLE = list(OPERATIONS.values())


class Policy:
    """Algorithm 2's distribution: l_r, l_d and l_k, all 0 at first."""

    def __init__(self):
        size = len(OPERATIONS)
        self.num_ops = torch.zeros(MAX_OPS, requires_grad=True)
        self.keep = torch.zeros(size, requires_grad=True)
        self.magnitude = torch.zeros(size, BINS, requires_grad=True)
        self.logits = [self.num_ops, self.keep, self.magnitude]

    def sample(self, n, generator):
        """For each image a list of (operation, kept, bin, sign, centre); uniform numbers decide."""
        uniforms = torch.rand(n, 1 + 6 * MAX_OPS, dtype=torch.float64, generator=generator).tolist()
        with torch.no_grad():
            num_ops = self.num_ops.double().softmax(0).cumsum(0).tolist()
            keep = self.keep.double().sigmoid().tolist()
            magnitude = self.magnitude.double().softmax(1).cumsum(1).tolist()
        return [self._draw(row, num_ops, keep, magnitude) for row in uniforms]

    def _draw(self, row, num_ops, keep, magnitude):
        def category(cumulative, u):
            return sum(u >= c for c in cumulative[:-1])

        drawn, urn = [], list(range(len(OPERATIONS)))
        for slot in range(1 + category(num_ops, row[0])):
            u = row[1 + 6 * slot : 7 + 6 * slot]
            pick = slot + int(u[0] * (len(urn) - slot))  # without replacement
            urn[slot], urn[pick] = urn[pick], urn[slot]
            op = urn[slot]
            sign = -1 if TABLE[op][3] and u[3] < 0.5 else 1
            drawn.append((op, u[1] < keep[op], category(magnitude[op], u[2]), sign, u[4:]))
        return drawn

    def log_prob(self, draws):
        """log p(a_i; phi): of the draws that were made, but for a constant."""
        num_ops, magnitude = self.num_ops.log_softmax(0), self.magnitude.log_softmax(1)
        kept, dropped = F.logsigmoid(self.keep), F.logsigmoid(-self.keep)
        return torch.stack(
            [
                num_ops[len(drawn) - 1]
                + sum(kept[o] + magnitude[o, k] if keep else dropped[o] for o, keep, k, *_ in drawn)
                for drawn in draws
            ]
        )


def augment(image, drawn):
    """Apply the kept operations to one uint8 image (3, H, W), in the order drawn."""
    image = to_pil_image(image)
    for op, kept, k, sign, center in drawn:
        if kept:
            low, high, whole, _, apply = TABLE[op]
            distance = (high - low) * k / (BINS - 1)
            image = apply(image, sign * (low + (int(distance) if whole else distance)), center)
    return pil_to_tensor(image)


def pair(model, loss, optimizer, policy, meta_optimizer, batch, next_batch, generator):
    """OLA training: an augmented step, then a plain one that rewards it."""
    images, targets = batch
    draws = policy.sample(len(images), generator)
    images = torch.stack([augment(i, d) for i, d in zip(images, draws, strict=True)])
    parameters = dict(model.named_parameters())

    def example_loss(parameters, image, target):
        return loss(functional_call(model, parameters, (image[None] / 255,)), target[None])

    values = {name: p.detach() for name, p in parameters.items()}
    each = vmap(grad(example_loss), in_dims=(None, 0, 0))(values, images.float(), targets)
    for name, parameter in parameters.items():
        parameter.grad = each[name].mean(0)
    optimizer.step()

    optimizer.zero_grad()
    images, targets = next_batch
    loss(model(images.float() / 255), targets).backward()
    # Equation 1: r_i = <grad l_i(theta_t), grad L(theta_{t+1})>, then normalised in the batch.
    rewards = sum((each[n] * p.grad).flatten(1).sum(1) for n, p in parameters.items())
    rewards = (rewards - rewards.mean()) / rewards.std(correction=0)
    optimizer.step()
    optimizer.zero_grad()

    # Equation 3, maximised: the mean of r_i grad log p(a_i; phi).
    meta_optimizer.zero_grad()
    (-(rewards * policy.log_prob(draws)).mean()).backward()
    meta_optimizer.step()


def main(pairs=150):
    from sklearn.datasets import load_digits  # 8 x 8 grey levels in 0 .. 16

    digits = load_digits()
    images = torch.tensor(digits.images * 15.9).to(torch.uint8)[:, None]
    images = F.interpolate(images.expand(-1, 3, -1, -1), size=(32, 32))
    targets = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    policy = Policy()
    meta_optimizer = torch.optim.Adam(policy.logits, lr=0.1)
    order, train = torch.Generator().manual_seed(0), 1000
    for _ in range(pairs):
        first, second = torch.randint(0, train, (2, 64), generator=order)
        batches = (images[first], targets[first]), (images[second], targets[second])
        pair(model, F.cross_entropy, optimizer, policy, meta_optimizer, *batches, order)
    with torch.no_grad():
        found = model(images[train:].float() / 255).argmax(1)
    print(f"accuracy on {len(found)} other digits: {(found == targets[train:]).float().mean():.3f}")
    for keep, name in sorted(zip(policy.keep.sigmoid().tolist(), OPERATIONS, strict=True)):
        print(f"{name}: kept {keep:.2f}")


if __name__ == "__main__":
    main()
