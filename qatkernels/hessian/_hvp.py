"""Hessian-vector products through the straight-through model, by two engines.

The Hessian is that of the *surrogate* loss that training minimizes: the derivative of a quantizer is its pass-through
mask, which is held constant.

    reverse    g = dL/dW with its graph, then d(g . v)/dW       the graph of g serves any number of vectors v
    forward    dL/dW along W + t v, by forward mode             keeps no memory after the product

In a network of linear layers a gradient takes three matrix products per layer. A Hessian-vector product takes six with
the reverse engine on a kept graph, nine on a new graph, and nine with the forward engine (measured: bench/results). So
``reverse`` is the default.

Attention: only the math backend of ``scaled_dot_product_attention`` has second derivatives. It is selected while a
graph is made, and a message is logged once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch_compat import preserve_version_counter
from ..dtensor import is_dtensor
from ..nn.replay import RandomState, untouched

logger = logging.getLogger(__package__)

#: Error message for a direction of weight_norm in ``params``.
WEIGHT_NORM = (
    "params holds a direction v of torch's weight_norm, whose second derivative torch computes wrongly: leave it out "
    "of params, or remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations)"
)

ENGINES = ("reverse", "forward")

LossFn = Callable[[], Tensor]
Scope = Callable[[], contextlib.AbstractContextManager[None]]

_logged_attention = False


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Enable gradients, and select the implementations of torch's operators that have second derivatives."""
    global _logged_attention
    if not _logged_attention:
        _logged_attention = True
        logger.info("attention runs on its math backend here: no other backend has second derivatives")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def check_engine(engine: str) -> None:
    """Raise ValueError unless this is the name of an engine."""
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, must be one of {ENGINES}")


def check_whole(params: Iterable[Tensor]) -> None:
    """Raise ValueError if a parameter is sharded: FSDP2's hooks gather weights for one backward, not for a second."""
    if any(is_dtensor(p) for p in params):
        raise ValueError(
            "parameters are sharded (fully_shard), must be whole: FSDP2 gathers weights for one backward, and a second "
            "derivative needs them again. Use HessianOperator(model, loss_fn, batches), which takes sharded models, or "
            "give it the parameters of qatkernels.nn.gather_model(model), a whole copy in every process"
        )


def checked_loss(loss: object, params: Sequence[Tensor]) -> Tensor:
    """Return the loss as a scalar, after checking that its Hessian can be computed.

    Raises:
        ValueError: if the loss is not a real scalar, depends on nothing that requires grad, or goes through a reentrant
            checkpoint, which hides parameters.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss is a {type(loss).__name__}, must be a tensor with one element")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"the loss is {loss.dtype} of shape {tuple(loss.shape)}, must be one floating-point number: reduce it"
        )
    if not loss.requires_grad:
        frozen = sum(not p.requires_grad for p in params)
        because = (
            f"{frozen} of {len(params)} do not require grad"
            if frozen
            else (
                "it is detached, made without grad or in inference_mode, or all inside torch.utils.checkpoint with "
                "use_reentrant=True: that must be False here"
            )
        )
        raise ValueError(f"the loss does not depend on the parameters ({because})")
    if _has_reentrant_checkpoint(loss):
        raise ValueError(
            "the loss goes through torch.utils.checkpoint with use_reentrant=True, which hides parameters from "
            "torch.autograd.grad and cannot be differentiated twice: call checkpoint(..., use_reentrant=False) (in "
            "transformers: gradient_checkpointing_enable({'use_reentrant': False})), or turn it off and give "
            "HessianOperator checkpoint=True"
        )
    return loss.reshape(())


def _nodes(loss: Tensor) -> Iterator[Node]:
    """Yield the nodes of the autograd graph of a loss."""
    queue, visited = [loss.grad_fn], set[Node]()
    while queue:
        node = queue.pop()
        if node is not None and node not in visited:
            visited.add(node)
            yield node
            queue += [following for following, _ in node.next_functions]


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the graph of the loss has a reentrant checkpoint: torch's, or a copy of it with the same name.

    Autograd does not see the parameters inside. For those it would return None, or only the part of the gradient that
    comes from their use outside.
    """
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(loss))


def _check_second_derivatives(loss: Tensor, params: Sequence[Tensor]) -> None:
    """Raise ValueError where torch silently computes a wrong second derivative.

    Its fused weight_norm treats the norm of v as a constant (torch 2.13 and before), so the Hessian is not even
    symmetric.
    """
    ids = {id(p) for p in params}
    for node in _nodes(loss):
        if node.name().startswith("WeightNormInterfaceBackward"):
            leaf = node.next_functions[0][0]
            if id(getattr(leaf, "variable", None)) in ids:
                raise ValueError(WEIGHT_NORM)


def check_require_grad(params: Sequence[Tensor]) -> None:
    """Raise ValueError if a parameter does not require grad."""
    if frozen := [i for i, p in enumerate(params) if not p.requires_grad]:
        raise ValueError(f"params{frozen[:5]} do not require grad, all must: call requires_grad_() on them")


def gradient_of(loss: Tensor, params: Sequence[Tensor], *, create_graph: bool) -> list[Tensor]:
    """Return the gradient of a loss: zeros for a parameter that it does not depend on.

    Raises:
        ValueError: if the loss depends on none of the parameters, or a parameter does not require grad.
    """
    check_require_grad(params)
    grads = torch.autograd.grad(loss, list(params), create_graph=create_graph, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError("the loss does not depend on the parameters")
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]


class GradientGraph:
    """A loss, its gradient, and the graph of the gradient. The reverse engine can keep it between products.

    Args:
        loss_fn: returns the loss.
        params: the parameters to differentiate with respect to.
        scope: makes a context for each run of the model: the forward, and each backward that recomputes checkpointed
            modules. With it every run starts from the same buffers.

    Attributes:
        loss: the loss, detached.
        gradient: the gradient, detached.
    """

    def __init__(self, loss_fn: LossFn, params: Sequence[Tensor], scope: Scope = contextlib.nullcontext) -> None:
        with scope(), twice_differentiable():
            loss = checked_loss(loss_fn(), params)
            _check_second_derivatives(loss, params)
        with scope(), twice_differentiable():
            grads = gradient_of(loss, params, create_graph=True)
        self.params, self._scope = list(params), scope
        self.loss = loss.detach()
        self.gradient = [g.detach() for g in grads]
        self._grads = grads

    def product(self, v: Sequence[Tensor], *, keep: bool = True) -> list[Tensor]:
        """Return the Hessian times ``v``.

        Args:
            v: one tensor like each parameter.
            keep: whether to keep the graph for another product.
        """
        # A gradient without a graph is constant: the loss is linear in that parameter.
        live = [(g, t) for g, t in zip(self._grads, v, strict=True) if g.requires_grad]
        if not live:
            return [torch.zeros_like(p) for p in self.params]
        grads, along = zip(*live, strict=True)
        with self._scope(), twice_differentiable():
            products = torch.autograd.grad(grads, self.params, along, retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h for h, p in zip(products, self.params, strict=True)]


def forward_product(
    loss_fn: LossFn, params: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the loss, its gradient and the Hessian times ``v`` by forward mode over reverse mode.

    The tangents are put on the parameters in place, without changing their values or versions, because the closure
    reads its own parameters and cannot be given others.

    Raises:
        ValueError: if an operation in the loss has no forward mode.
    """
    try:
        return _forward_product(loss_fn, params, v)
    except NotImplementedError as error:
        if not any(words in str(error) for words in ("jvp", "forward AD")):
            raise
        raise ValueError(
            "engine is 'forward', but an operation in the loss has no forward mode (for example torch.utils.checkpoint "
            f"with use_reentrant=True): use engine='reverse', and use_reentrant=False ({error})"
        ) from error


def _forward_product(
    loss_fn: LossFn, params: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    with twice_differentiable(), forward_ad.dual_level():
        with torch.no_grad(), preserve_version_counter(tuple(params)):
            for p, t in zip(params, v, strict=True):
                # Subtract, not add: -0.0 - 0.0 is -0.0 and keeps the value, -0.0 + 0.0 is 0.0.
                p.sub_(forward_ad.make_dual(torch.zeros_like(p), -t))
        loss = checked_loss(loss_fn(), params)
        # With a graph, because the faster formulas that torch uses without one have no forward mode.
        grads = gradient_of(loss, params, create_graph=True)
        duals = [forward_ad.unpack_dual(g) for g in grads]
        value = forward_ad.unpack_dual(loss).primal.detach()
    products = [
        torch.zeros_like(p) if d.tangent is None else d.tangent.detach() for p, d in zip(params, duals, strict=True)
    ]
    return value, [d.primal.detach() for d in duals], products


def check_vector(params: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``v`` holds one tensor like each parameter."""
    if len(params) == 0:
        raise ValueError("params is empty, must hold a tensor")
    check_whole(params)
    if len(v) != len(params):
        raise ValueError(f"v holds {len(v)} tensors, must hold {len(params)} like params")
    for i, (p, t) in enumerate(zip(params, v, strict=True)):
        if t.shape != p.shape or t.dtype != p.dtype or t.device != p.device:
            raise ValueError(
                f"v[{i}] is {t.dtype} of shape {tuple(t.shape)} on {t.device}, must be {p.dtype} of shape "
                f"{tuple(p.shape)} on {p.device} like params[{i}]"
            )


def hvp(
    loss_fn: LossFn,
    params: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    engine: str = "reverse",
    model: nn.Module | None = None,
) -> list[Tensor]:
    """Return the Hessian of a loss times a vector.

    The states of torch's generators are restored, so that repeated products have the same dropout and noise.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp(lambda: (w**3).sum(), [w], [torch.tensor([1.0, 10.0])])  # the Hessian is diag(6 w)
    [tensor([  6., 120.])]

    Args:
        loss_fn: a closure without arguments that returns the loss, a scalar: the same value at every call.
        params: the parameters that it reads. They must require grad.
        v: one tensor like each parameter.
        engine: ``"reverse"`` or ``"forward"`` (see the docstring of this module). Their results are equal up to
            rounding.
        model: the model whose forward ``loss_fn`` runs. If given, its buffers (such as running statistics), modes and
            gradients are restored. If None, they are as a call of ``loss_fn`` leaves them.

    Returns:
        One tensor like each parameter. The derivative of a quantizer is straight-through, with a constant mask.

    Raises:
        ValueError: if the loss is not a scalar or does not depend on the parameters, ``v`` does not fit them, or the
            second derivative would be wrong: for sharded parameters, reentrant checkpoints, and the v of weight_norm.
    """
    check_engine(engine)
    check_vector(params, v)
    scope = scope_of(model)
    with RandomState(params).replayed():
        if engine == "reverse":
            return GradientGraph(loss_fn, params, scope).product(v, keep=False)
        with scope():
            return forward_product(loss_fn, params, v)[2]


def scope_of(model: nn.Module | None) -> Scope:
    """Return a function that makes contexts. Each context restores the model at its end, if a model is given."""
    if model is None:
        return contextlib.nullcontext
    return functools.partial(untouched, model, gradients=True)
