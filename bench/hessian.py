"""The Hessian tools that are compared, and the problem: the same model, batch and parameters for each tool."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qatkernels.hessian import HessianOperator
from qatkernels.nn import QuantConfig, quantize_model, quantized_weights
from qatkernels.ops import cross_entropy
from qatkernels.trainer.demo_model import ModelConfig, Transformer
from qatkernels.trainer.models import EXCLUDED

Times = Callable[[Tensor], Tensor]


class Flat(nn.Module):
    """A language model with logits ``[tokens, vocabulary]``, the shape that other libraries' loss functions take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[tokens, vocabulary]``."""
        return self.model(tokens).flatten(0, 1)


@dataclass
class Problem:
    """A quantized transformer, a few steps into training, and a batch.

    Args:
        config: shape of the model.
        windows: windows in the batch.
        bits: width of the quantized weights.
        device: device of model and batch.
        steps: training steps before the comparison, so that the weights are not random.
    """

    config: ModelConfig
    windows: int
    bits: float = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    steps: int = 20

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = quantize_model(Transformer(self.config), QuantConfig(bits=self.bits), exclude=EXCLUDED)
            # Synthetic text: the next byte is the current one plus 1, or random.
            shape = (self.windows, self.config.context + 1)
            steps = torch.where(torch.rand(shape) < 0.1, torch.randint(self.config.vocab, shape), 1)
            tokens = steps.cumsum(1) % self.config.vocab
        self.x, self.y = tokens[:, :-1].to(self.device), tokens[:, 1:].to(self.device)
        self.model = Flat(model).to(self.device)
        self._train()
        self.params = quantized_weights(self.model)
        for p in self.model.parameters():  # the tools differentiate every parameter that requires grad
            p.requires_grad_(any(p is q for q in self.params))

    def _train(self) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        for _ in range(self.steps):
            self.loss(self.model).backward()
            optimizer.step()
            optimizer.zero_grad()

    @property
    def n(self) -> int:
        """Number of differentiated parameters."""
        return sum(p.numel() for p in self.params)

    @property
    def tokens(self) -> int:
        """Predicted tokens in the batch."""
        return self.y.numel()

    def loss(self, model: nn.Module, batch: Any = None) -> Tensor:
        """Return the mean cross-entropy, in plain PyTorch."""
        return F.cross_entropy(model(self.x), self.y.flatten())

    def vector(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a random unit vector."""
        v = torch.randn(self.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (v / v.norm()).to(self.device, dtype)

    def operator(self, **options: Any) -> HessianOperator:
        """Return our operator."""
        return HessianOperator(self.model, lambda m, _: cross_entropy(m(self.x), self.y.flatten()), [None], **options)

    def gradient(self) -> Tensor:
        """Return the gradient as in training: with any attention kernel, and without second derivatives."""
        grads = torch.autograd.grad(self.loss(self.model), self.params)
        return torch.cat([g.reshape(-1) for g in grads])

    def copy(self) -> nn.Module:
        """Return a copy of the model, for tools that modify it."""
        return copy.deepcopy(self.model)


def math_attention(call: Times) -> Times:
    """Return a call with math attention. Only that has second derivatives, and other tools do not select it."""

    def inside(v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return call(v)

    return inside


def pyhessian(problem: Problem) -> tuple[Times, Any]:
    """Return PyHessian's product (double backward on a graph that it keeps), and its object."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    with sdpa_kernel(SDPBackend.MATH):
        computer = hessian(
            problem.copy(), lambda out, y: F.cross_entropy(out, y.flatten()), data=(problem.x, problem.y),
            cuda=problem.device.type == "cuda",
        )  # fmt: skip
    sizes = [p.numel() for p in computer.params]

    def times(v: Tensor) -> Tensor:
        parts = [t.view(p.shape) for t, p in zip(v.split(sizes), computer.params, strict=True)]
        return torch.cat([h.reshape(-1) for h in hessian_vector_product(computer.gradsH, computer.params, parts)])

    return math_attention(times), computer


def eigenthings(problem: Problem, method: str = "autograd") -> tuple[Times, Any]:
    """Return the product of hessian-eigenthings, and its operator."""
    from hessian_eigenthings import HessianOperator as Operator

    operator = Operator(problem.copy(), [None], problem.loss, method=method)
    return math_attention(operator.matvec), operator


def curvlinops(problem: Problem) -> tuple[Times, Any]:
    """Return the product of curvlinops (forward over reverse), and its operator.

    torch's fused backward of SiLU has no forward mode. SiLU is replaced by x * sigmoid(x) during the product.
    """
    from curvlinops import HessianLinearOperator

    model = problem.copy()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(params.values()), [(problem.x, problem.y.flatten())],
            check_deterministic=False, num_data=problem.tokens, batch_size_fn=lambda x: x.numel(),
        )  # fmt: skip

    def times(v: Tensor) -> Tensor:
        with mock.patch.object(F, "silu", lambda x: x * torch.sigmoid(x)):
            return operator @ v

    return math_attention(times), operator
