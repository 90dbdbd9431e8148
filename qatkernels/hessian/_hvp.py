"""Hessian-vector products through the straight-through model, by two engines.

The Hessian is that of the *surrogate* that training descends: the derivative of a quantizer is its mask, held constant.

    reverse    g = dL/dW with its graph, then d(g . v)/dW       the graph of g, once made, serves any number of v
    forward    dL/dW along W + t v, by tangents                 nothing outlives the product

For a network of matrix products a gradient is three of them per layer; the reverse engine on a kept graph takes six, on
a fresh one nine, the forward engine nine. Measured: bench/results. That is why ``reverse`` is the default.

Attention: ``scaled_dot_product_attention`` has second derivatives in its math backend only, which is therefore selected
while a graph is made (and logged once).
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

from ..dtensor import is_dtensor
from ..nn.replay import RandomState, untouched

logger = logging.getLogger(__package__)

ENGINES = ("reverse", "forward")

LossFn = Callable[[], Tensor]
Scope = Callable[[], contextlib.AbstractContextManager[None]]

_said = False


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Select the implementations of torch's operators that have second derivatives, with gradients enabled."""
    global _said
    if not _said:
        _said = True
        logger.info("attention runs on its math backend here: no other backend has second derivatives")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def check_engine(engine: str) -> None:
    """Raise ValueError unless this is the name of an engine."""
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, must be one of {ENGINES}")


def check_whole(params: Iterable[Tensor]) -> None:
    """Raise ValueError if a parameter is sharded: FSDP2's hooks gather weights for one backward, not for two."""
    if any(is_dtensor(p) for p in params):
        raise ValueError(
            "parameters are sharded (fully_shard), must be whole: use the model before fully_shard, or load its "
            "checkpoint into one that is not sharded; several processes can each hold it and have batches of their own"
        )


def checked_loss(loss: object, params: Sequence[Tensor]) -> Tensor:
    """Return a loss that has a Hessian.

    Raises:
        ValueError: if it is no real scalar, does not depend on anything that requires grad, or hides what it depends on
            in a reentrant checkpoint.
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
    """Yield the nodes of a loss's graph."""
    waiting, seen = [loss.grad_fn], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether a reentrant checkpoint (torch's, or one of the same name made after it) is in the loss's graph.

    Autograd does not know the parameters inside: it would return None for them, or a part where they are used outside,
    too.
    """
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(loss))


def _check_second_derivatives(loss: Tensor, params: Sequence[Tensor]) -> None:
    """Raise ValueError where torch's second derivative is wrong, which no error of its own says.

    That of its fused weight_norm takes the norm of v as a constant (2.13 and before): it is not even symmetric.
    """
    ids = {id(p) for p in params}
    for node in _nodes(loss):
        if node.name().startswith("WeightNormInterfaceBackward"):
            leaf = node.next_functions[0][0]
            if id(getattr(leaf, "variable", None)) in ids:
                raise ValueError(
                    "params holds a direction v of torch's weight_norm, whose second derivative torch computes "
                    "wrongly: leave it out of params, or remove the parametrization "
                    "(torch.nn.utils.parametrize.remove_parametrizations)"
                )


def gradient_of(loss: Tensor, params: Sequence[Tensor], *, create_graph: bool) -> list[Tensor]:
    """Return the gradient of a loss, zero where it does not depend on a parameter.

    Raises:
        ValueError: if it depends on none of them, or one of them does not require grad.
    """
    if frozen := [i for i, p in enumerate(params) if not p.requires_grad]:
        raise ValueError(f"params{frozen[:5]} do not require grad, all must: call requires_grad_() on them")
    grads = torch.autograd.grad(loss, list(params), create_graph=create_graph, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError("the loss does not depend on the parameters")
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]


class GradientGraph:
    """A loss, its gradient, and the gradient's graph: what the reverse engine keeps between products.

    Args:
        loss_fn: gives the loss.
        params: what to differentiate with respect to.
        scope: makes a context for each run of the model: the forward, each backward that runs checkpointed modules
            again. All of them then start from the same buffers.

    Attributes:
        loss: the loss, detached.
        gradient: its gradient, detached.
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
            v: a tensor like each parameter.
            keep: whether another product will follow.
        """
        # A gradient without a graph is constant: the loss is linear in what gave it.
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

    The parameters carry the tangents themselves, in place and without a change of value or version, because a closure
    reads the parameters that it knows.

    Raises:
        ValueError: if an operation on the way has no forward mode.
    """
    try:
        return _forward_product(loss_fn, params, v)
    except NotImplementedError as error:
        if not any(words in str(error) for words in ("jvp", "forward AD")):
            raise
        raise ValueError(
            "engine is 'forward', but something in the loss has no forward mode (torch.utils.checkpoint with "
            f"use_reentrant=True has none): take engine='reverse', and use_reentrant=False ({error})"
        ) from error


def _forward_product(
    loss_fn: LossFn, params: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    with twice_differentiable(), forward_ad.dual_level():
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(params)):
            for p, t in zip(params, v, strict=True):
                # Minus zero plus zero is zero; minus zero minus zero is not.
                p.sub_(forward_ad.make_dual(torch.zeros_like(p), -t))
        loss = checked_loss(loss_fn(), params)
        # With a graph, since torch's quicker formulas for a last derivative have no forward mode.
        grads = gradient_of(loss, params, create_graph=True)
        duals = [forward_ad.unpack_dual(g) for g in grads]
        value = forward_ad.unpack_dual(loss).primal.detach()
    products = [
        torch.zeros_like(p) if d.tangent is None else d.tangent.detach() for p, d in zip(params, duals, strict=True)
    ]
    return value, [d.primal.detach() for d in duals], products


def check_vector(params: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``v`` holds a tensor like each parameter."""
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

    torch's generators are afterwards as they were before, so that products in a row are of the same dropout and noise.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp(lambda: (w**3).sum(), [w], [torch.tensor([1.0, 10.0])])  # the Hessian is diag(6 w)
    [tensor([  6., 120.])]

    Args:
        loss_fn: a closure without arguments that gives the loss, a scalar; the same at every call.
        params: parameters that it reads, which require grad.
        v: a tensor like each parameter.
        engine: ``"reverse"`` or ``"forward"`` (see the module); equal up to rounding.
        model: the model whose forward ``loss_fn`` runs. Its buffers (running statistics, say), modes and gradients are
            then afterwards as before; without it they are what a call of ``loss_fn`` makes of them.

    Returns:
        A tensor like each parameter. Quantizers count by the straight-through rule, their mask held constant.

    Raises:
        ValueError: if the loss is no scalar or does not depend on the parameters, ``v`` does not fit them, or a second
            derivative would be wrong: of sharded parameters, of what a reentrant checkpoint hides, of weight_norm's v.
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
    """Return what makes contexts that leave a model as it is, if it is known."""
    if model is None:
        return contextlib.nullcontext
    return functools.partial(untouched, model, gradients=True)
