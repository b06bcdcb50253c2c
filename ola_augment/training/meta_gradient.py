"""Algorithm 1 for differentiable meta-parameters: the meta-gradient itself, no rewards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ola_augment.alignment.proof import trainable_parameters


class MetaGradientUpdater:
    """Moves meta-parameters phi so that the step they shaped makes the next loss smaller.

    With theta_{t+1} = theta_t - alpha grad l_t(theta_t, phi), the meta-gradient is
    -alpha <grad L(theta_{t+1}), d/dphi grad l_t(theta_t, phi)>. Two ways give it:

    - :meth:`step` re-uses the next step's ordinary gradient as the vector of one vector-Jacobian
      product;
    - :meth:`unrolled_parameters` and :meth:`step_unrolled` backpropagate the next loss through the
      update itself: the same numbers with more memory; it is here to be compared with.

    Both need second derivatives, which torch's fused attention lacks on a CPU: run such models in
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        model: trained by the user's own optimizer.
        meta_parameters: phi, leaf tensors that require gradients.
        inner_lr: alpha, the learning rate of plain SGD; positive. For other optimizers alpha scales
            the meta-gradient only, which Adam, the default meta-optimizer, does not see.
        lr: of the meta-optimizer, Adam; positive.
        optimizer: over phi, instead of Adam; ``lr`` is then ignored.

    Raises:
        ValueError: no meta-parameter, one that is not a leaf requiring gradients, a model without
            trainable parameters, or a rate that is not positive.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> weights = torch.zeros(4, requires_grad=True)   # of 4 examples, before the sigmoid
        >>> meta = MetaGradientUpdater(model, [weights], inner_lr=0.1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(4, 2), torch.randn(4, 1)
        >>> losses = (meta.forward(x) - y).square().mean(1)
        >>> meta.backward((weights.sigmoid() * losses).mean())
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> (model(x) - y).square().mean().backward()
        >>> meta.step()

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
    """

    def __init__(
        self,
        model: nn.Module,
        meta_parameters: Iterable[Tensor],
        inner_lr: float,
        lr: float = 0.1,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model = model
        self.meta_parameters = list(meta_parameters)
        if not self.meta_parameters:
            raise ValueError("meta_parameters must hold at least one tensor, got none")
        if not all(phi.is_leaf and phi.requires_grad for phi in self.meta_parameters):
            raise ValueError("meta_parameters must be leaf tensors with requires_grad=True")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model must have a trainable parameter, got none")
        if not inner_lr > 0 or not lr > 0:
            raise ValueError(f"inner_lr and lr must be positive, got {inner_lr} and {lr}")
        self.inner_lr = inner_lr
        self.optimizer = optimizer or torch.optim.Adam(self.meta_parameters, lr=lr)
        self._theta: dict[str, Tensor] = {}
        self._gradients: tuple[Tensor, ...] | None = None
        self._unrolled: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at a copy of theta_t, which the optimizer will not overwrite.

        Args:
            args: passed to the model.
            kwargs: passed to the model.

        Returns:
            What the model returns.
        """
        if self._gradients is not None or not self._theta:
            self._theta = {
                name: parameter.detach().clone().requires_grad_()
                for name, parameter in trainable_parameters(self.model).items()
            }
            self._gradients = None
        return functional_call(self.model, self._theta, args, kwargs)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate l_t into the parameters' ``.grad``, differentiable in phi.

        Args:
            loss: scalar, from outputs of :meth:`forward` and the meta-parameters.

        Raises:
            RuntimeError: :meth:`forward` was not called since the last backward.
        """
        if not self._theta or self._gradients is not None:
            raise RuntimeError("backward() needs outputs of forward(): call forward() first")
        self._gradients = torch.autograd.grad(
            loss, list(self._theta.values()), create_graph=True, materialize_grads=True
        )
        trained = trainable_parameters(self.model).values()
        for parameter, gradient in zip(trained, self._gradients, strict=True):
            parameter.grad = gradient.detach().clone()

    def step(self) -> None:
        """Move phi with the gradient that the next step's backward left in ``.grad``.

        Raises:
            RuntimeError: no :meth:`backward` before, or parameters without a gradient.
        """
        recorded = self._recorded()
        reference = [parameter.grad for parameter in trainable_parameters(self.model).values()]
        if all(gradient is None for gradient in reference):
            raise RuntimeError("step() needs the next step's gradient: run its backward first")
        pairs = [(g, v) for g, v in zip(recorded, reference, strict=True) if v is not None]
        objective = torch.stack([(g * v).sum() for g, v in pairs]).sum()
        self._descend(-self.inner_lr * objective)

    def unrolled_parameters(self) -> dict[str, Tensor]:
        """theta_{t+1} = theta_t - alpha grad l_t(phi), for ``torch.func.functional_call``.

        Returns:
            Parameter name -> tensor of its shape, differentiable in phi.

        Raises:
            RuntimeError: no :meth:`backward` before.
        """
        recorded = self._recorded()
        self._unrolled = {
            name: theta.detach() - self.inner_lr * gradient
            for (name, theta), gradient in zip(self._theta.items(), recorded, strict=True)
        }
        return dict(self._unrolled)

    def step_unrolled(self, next_loss: Tensor) -> None:
        """Move phi by backpropagation through the update; ``.grad`` becomes grad L(theta_{t+1}).

        Args:
            next_loss: scalar, of a model with :meth:`unrolled_parameters`. It must not depend on
                phi in any other way (the stop-gradient of Algorithm 1).

        Raises:
            RuntimeError: no :meth:`backward` or :meth:`unrolled_parameters` before.
        """
        self._recorded()
        if not self._unrolled:
            raise RuntimeError("step_unrolled() needs a loss at unrolled_parameters(): call it")
        unrolled = list(self._unrolled.values())
        gradients = self._descend(next_loss, unrolled)
        trained = trainable_parameters(self.model).values()
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient

    def _recorded(self) -> tuple[Tensor, ...]:
        if self._gradients is None:
            raise RuntimeError("nothing to differentiate: run forward() and backward() first")
        return self._gradients

    def _descend(self, objective: Tensor, others: list[Tensor] | None = None) -> list[Tensor]:
        """Move phi; return the gradients with respect to the others."""
        wanted = [*self.meta_parameters, *(others or [])]
        gradients = torch.autograd.grad(objective, wanted, materialize_grads=True)
        for phi, gradient in zip(self.meta_parameters, gradients, strict=False):
            phi.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._theta, self._gradients, self._unrolled = {}, None, {}
        return list(gradients[len(self.meta_parameters) :])
