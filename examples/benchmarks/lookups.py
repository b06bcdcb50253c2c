"""Networks that look rows up where data or chance say: what engines must not verify for ever."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 64


class Tokens(nn.Module):
    """(B, 3, 32, 32) -> (B, classes): 64 patches, two encoder layers, a look-up between them."""

    def __init__(self, look_up: Callable[[Tokens, Tensor], Tensor], classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.first, self.last = (
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True) for _ in range(2)
        )
        self.masked = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.codes = nn.Parameter(torch.randn(32, WIDTH))
        self.head = nn.Linear(WIDTH, classes)
        self.look_up = look_up

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.first(self.embed(images).flatten(2).mT)
        return self.head(self.last(self.look_up(self, tokens)).mean(1))


def rows_of(index: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, WIDTH)


def masked_autoencoder(model: Tokens, h: Tensor) -> Tensor:
    order = torch.rand(h.shape[:2]).argsort(1)
    seen = torch.gather(h, 1, rows_of(order[:, :16]))
    both = torch.cat([seen, model.masked.expand(len(h), 48, -1)], 1)
    return torch.gather(both, 1, rows_of(order.argsort(1)))


def patch_dropout(model: Tokens, h: Tensor) -> Tensor:
    return h[torch.arange(len(h)).unsqueeze(1), torch.rand(h.shape[:2]).topk(32, 1).indices]


def strongest_tokens(model: Tokens, h: Tensor) -> Tensor:
    return torch.take_along_dim(h, rows_of(h.norm(dim=2).topk(32, 1).indices), 1)


def random_crop(model: Tokens, h: Tensor) -> Tensor:
    start = int(torch.randint(16, ()))
    return h[:, start : start + 48]


def codebook(model: Tokens, h: Tensor) -> Tensor:
    codes = model.codes[torch.cdist(h.detach(), model.codes.detach()).argmin(2)]
    return h + codes


LOOK_UPS: dict[str, Callable[[Tokens, Tensor], Tensor]] = {
    "masked autoencoder (gather)": masked_autoencoder,
    "patch dropout": patch_dropout,
    "tokens by top-k": strongest_tokens,
    "random crop by an int": random_crop,
    "codebook": codebook,
}
