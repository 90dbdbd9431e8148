"""Derivatives of every order and mode: against the published rules, each other, and through torch's transforms."""

import math

import pytest
import torch
from torch.func import grad, hessian, jvp, vjp, vmap
from torch.library import opcheck

import qatkernels as qk
from qatkernels.ops._op import OPS
from qatkernels.testing.compare import assert_same_bits
from qatkernels.testing.samples import GRIDS, every_sample, make
from tests.compiled import torch_compile_blamed

GRID_IDS = [f"{g.scheme}{g.bits}" for g in GRIDS]


def published_rule(w, s, grid, g, gamma):
    """The table of docs/algorithms.md, scheme by scheme, written without the library's formulas. Rows share a scale."""
    r = w / s[:, None]
    if grid.scheme == "binary":
        summand, mask = torch.where(w < 0, -1.0, 1.0), (r >= -1) & (r <= 1)
    elif grid.scheme == "ternary":
        mask = r.abs() <= 0.99
        q = torch.round(r.clamp(-0.99, 0.99) * 1.5) / 1.5
        summand = torch.where(mask, q - r, torch.sign(r))
    elif grid.scheme == "seq":
        half = 2 ** (grid.bits - 1)
        mask = r.abs() <= 0.99
        q = (torch.round(r.clamp(-0.99, 0.99) * half - 0.5) + 0.5) / half
        summand = torch.where(mask, q - r, torch.sign(r) * (1 - 0.5 / half))
    else:
        low, high = (
            (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) if grid.scheme == "lsq" else (0, 2**grid.bits - 1)
        )
        mask = (r >= low) & (r <= high)
        summand = torch.where(mask, torch.round(r) - r, torch.where(r < low, float(low), float(high)))
    return torch.where(mask, g, 0.0), gamma * (g * summand).sum(-1)


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_backward_is_the_published_rule(grid):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 50, dtype=torch.float64, generator=generator, requires_grad=True)
    scale = (torch.rand(6, dtype=torch.float64, generator=generator) + 0.5) * (0.7 if grid.bits < 3 else 0.1)
    scale.requires_grad_()
    y = qk.fake_quantize(w, scale, grid)
    g = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    dw, ds = torch.autograd.grad(y, (w, scale), g)
    qmax = {"binary": 1, "ternary": 1}.get(grid.scheme, 2 ** (grid.bits - 1) - 1)
    qmax = 2**grid.bits - 1 if grid.scheme == "affine" else qmax
    expected_dw, expected_ds = published_rule(w.detach(), scale.detach(), grid, g, 1 / math.sqrt(w.numel() * qmax))
    assert_same_bits(dw, expected_dw)
    torch.testing.assert_close(ds, expected_ds, rtol=1e-12, atol=1e-14)


def test_lsq_plus_offset_gradient():
    """y = s * clamp(round(x / s + z)) - s * z: the learned offset gets a gradient only where x is clipped."""
    grid = qk.grids.affine(3)
    w = torch.linspace(-3, 3, 61, dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(2.25, dtype=torch.float64, requires_grad=True)
    y = qk.fake_quantize(w, scale, grid, zero_point=zero, grad_scale=1.0)
    ds, dz = torch.autograd.grad(y.sum(), (scale, zero))
    r = w / 0.5
    clipped = (r < -2.25) | (r > 7 - 2.25)
    assert 0 < clipped.sum() < 61
    torch.testing.assert_close(dz, -0.5 * clipped.sum().double())
    inside = torch.round(r + 2.25) - 2.25 - r
    ends = torch.where(r < 0, -2.25, 7 - 2.25)
    torch.testing.assert_close(ds, torch.where(clipped, ends, inside).sum())


def _point(grid, granularity="row", noise=True):
    """A float64 call with everything in it, as a function of its differentiable tensors."""
    sample = make(grid, (4, 24), torch.float64, granularity, noise=noise)
    zero = sample.zero_point

    def call(w, scale, *zero_point):
        return qk.fake_quantize(
            w, scale, grid, group_size=sample.group_size, zero_point=zero_point[0] if zero_point else None,
            noise_std=sample.noise_std, scale_noise_std=sample.scale_noise_std, seed=sample.seed,
        )  # fmt: skip

    return call, (sample.w, sample.scale) if zero is None else (sample.w, sample.scale, zero)


@pytest.mark.parametrize("granularity", ["row", "tensor", 8])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_forward_mode_is_the_transpose_of_backward(grid, granularity):
    call, primals = _point(grid, granularity)
    tangents = tuple(torch.randn_like(p) for p in primals)
    y, dy = jvp(call, primals, tangents)
    g = torch.randn_like(y)
    gradients = vjp(call, *primals)[1](g)
    torch.testing.assert_close((dy * g).sum(), sum((t * d).sum() for t, d in zip(tangents, gradients, strict=True)))


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_second_derivatives_agree_in_every_mode(grid):
    call, primals = _point(grid)
    x = torch.randn(5, 24, dtype=torch.float64)

    def loss(*args):
        return (x @ call(*args).T).pow(2).sum().add(1e-9).log()

    arguments = tuple(range(len(primals)))
    vectors = tuple(torch.randn_like(p) for p in primals)
    forward_over_reverse = jvp(grad(loss, argnums=arguments), primals, vectors)[1]
    leaves = [p.clone().requires_grad_() for p in primals]
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    reverse_over_reverse = torch.autograd.grad(gradients, leaves, vectors)
    reverse_over_forward = grad(lambda *p: jvp(loss, p, vectors)[1], argnums=arguments)(*primals)
    for a, b, c in zip(forward_over_reverse, reverse_over_reverse, reverse_over_forward, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
    assert any(h.abs().max() > 0 for h in forward_over_reverse)


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_hessian_holds_the_mask_constant(grid):
    """H = M (d2L/dy2) M with the mask of the point, exactly the straight-through rule."""
    call, primals = _point(grid, noise=False)
    w, rest = primals[0], primals[1:]
    target = torch.randn_like(w)

    def of_y(y):
        return (y - target).pow(4).sum()

    full = hessian(lambda w: of_y(call(w, *rest)))(w).reshape(w.numel(), w.numel())
    y = call(w, *rest)
    mask = vjp(lambda w: call(w, *rest), w)[1](torch.ones_like(w))[0].reshape(-1)
    expected = torch.diag(mask * 12 * (y - target).pow(2).reshape(-1) * mask)
    torch.testing.assert_close(full, expected)


@pytest.mark.parametrize("grid", [qk.grids.seq(2), qk.grids.affine(4)], ids=["seq", "affine"])
def test_forward_over_forward(grid):
    """The curvature along a tangent: y is linear to second order, so only the square curves."""
    call, primals = _point(grid)
    tangents = tuple(torch.randn_like(p) for p in primals)

    def loss(*args):
        return call(*args).square().sum()

    curvature = jvp(lambda *p: jvp(loss, p, tangents)[1], primals, tangents)[1]
    torch.testing.assert_close(curvature, 2 * jvp(call, primals, tangents)[1].square().sum())
    gradient = jvp(
        lambda *p: jvp(lambda *q: vjp(call, *q)[1](torch.ones_like(q[0])), p, tangents)[1], primals, tangents
    )
    assert all(t.eq(0).all() for t in gradient[1])


@pytest.mark.parametrize("grid", [qk.grids.seq(2), qk.grids.affine(4)], ids=["seq", "affine"])
def test_vmap_equals_a_loop(grid):
    call, primals = _point(grid)
    batch = tuple(torch.randn(3, *p.shape, dtype=p.dtype) for p in primals)

    def push(*tangents):
        return jvp(call, primals, tangents)[1]

    torch.testing.assert_close(vmap(push)(*batch), torch.stack([push(*t) for t in zip(*batch, strict=True)]))

    def pull(g):
        return vjp(call, *primals)[1](g)

    gs = torch.randn(3, *primals[0].shape, dtype=torch.float64)
    for got, each in zip(vmap(pull)(gs), zip(*[pull(g) for g in gs], strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(each))
    many = torch.stack([primals[0], primals[0] * 2])
    out = vmap(lambda w: call(w, *primals[1:]))(many)
    assert_same_bits(out, torch.stack([call(w, *primals[1:]) for w in many]))


@pytest.mark.parametrize(
    "op", ["fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "fake_quantize_dual", "quantize"]
)
def test_opcheck(op):
    chosen = [make(qk.grids.seq(2), (4, 8), noise=op != "quantize"), make(qk.grids.affine(4), (4, 8), granularity=4)]
    chosen += [make(qk.grids.lsq(4), (4, 8), out_dtype=torch.bfloat16)] if op != "quantize" else []
    for sample in chosen:
        args = [
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in sample.args(op)
        ]
        opcheck(getattr(torch.ops.qatkernels, op).default, tuple(args))
        plain = sample.args(op)
        outputs = OPS[op].meta(*plain)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        opcheck(getattr(torch.ops.qatkernels, f"{op}_out").default, (*plain, *outputs))


def test_opcheck_of_the_others():
    w, scale, grid = torch.randn(4, 8), torch.rand(4) + 0.1, qk.grids.lsq(4)
    codes = qk.quantize(w, scale, grid)
    point = (codes, scale.requires_grad_(), None, list(grid.constants), torch.float32)
    opcheck(torch.ops.qatkernels.dequantize.default, point)
    opcheck(torch.ops.qatkernels.fake_quantize_dynamic.default, (w.requires_grad_(), 8))
    opcheck(torch.ops.qatkernels.normal.default, (torch.tensor(3), 10, 0))


@pytest.mark.parametrize(
    "grid", [qk.grids.binary(), qk.grids.seq(2), qk.grids.lsq(4), qk.grids.affine(4)], ids=lambda g: g.scheme
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(grid, backend):
    """No graph break, and the same bits as eager, values and gradients."""
    sample = make(grid, (8, 32), torch.float32, "row", noise=True)

    def step(w, scale, zero_point, seed):
        y = qk.fake_quantize(
            w,
            scale,
            grid,
            zero_point=zero_point,
            noise_std=0.002,
            scale_noise_std=0.002,
            seed=seed,
            dtype=torch.bfloat16,
        )
        return qk.fake_quantize_dynamic(y, 8)

    def run(function):
        w, scale = sample.w.clone().requires_grad_(), sample.scale.clone().requires_grad_()
        y = function(w, scale, sample.zero_point, sample.seed)
        y.backward(torch.ones_like(y))
        return y.detach(), w.grad, scale.grad

    torch._dynamo.reset()
    with torch_compile_blamed(backend):
        for a, b in zip(run(torch.compile(step, fullgraph=True, backend=backend)), run(step), strict=True):
            assert_same_bits(a, b)


def test_dequantize_gradient():
    grid = qk.grids.affine(4)
    codes = torch.randint(0, 16, (3, 8), dtype=torch.int8)
    scale = (torch.rand(3, 2, dtype=torch.float64) + 0.5).requires_grad_()
    zero = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, z: qk.dequantize(codes, s, grid, group_size=4, zero_point=z, dtype=torch.float64), (scale, zero)
    )


def test_dynamic_is_the_identity_to_gradients():
    x = torch.randn(3, 16, requires_grad=True)
    g = torch.randn(3, 16)
    assert_same_bits(torch.autograd.grad(qk.fake_quantize_dynamic(x), x, g)[0], g)
    tangent = torch.randn(3, 16)
    assert_same_bits(jvp(qk.fake_quantize_dynamic, (x.detach(),), (tangent,))[1], tangent)
    assert (
        hessian(lambda x: qk.fake_quantize_dynamic(x).pow(2).sum())(x.detach()).reshape(48, 48).equal(2 * torch.eye(48))
    )


def test_nothing_but_w_the_scales_and_the_seed_is_saved():
    sample = make(qk.grids.affine(4), (64, 64), noise=True)
    leaves = [t.clone().requires_grad_() for t in (sample.w, sample.scale, sample.zero_point)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk.fake_quantize(leaves[0], leaves[1], sample.grid, zero_point=leaves[2], noise_std=0.01, seed=3)
    known = {t.data_ptr() for t in leaves}
    assert sum(t.numel() for t in saved if t.data_ptr() not in known) == 1


def test_noise_is_redrawn_in_the_backward():
    """The gradient is that of the noisy point, not of the clean one."""
    w = torch.zeros(1, 4096, requires_grad=True)
    scale = torch.full((1,), 1.0, requires_grad=True)
    y = qk.fake_quantize(w, scale, qk.grids.seq(2), noise_std=1.0, seed=11)
    (dw,) = torch.autograd.grad(y.sum(), w)
    noise = qk.ops.normal(torch.tensor(11), 4096)
    assert_same_bits(dw[0], (noise.abs() <= 0.99).float())
    assert_same_bits(y.detach()[0], qk.fake_quantize(noise, scale.detach()[0], qk.grids.seq(2)))


def test_seed_forms_and_generator():
    w, scale, grid = torch.randn(8, 16), torch.rand(8) + 0.1, qk.grids.lsq(3)
    noisy = {"noise_std": 0.3, "scale_noise_std": 0.1}
    a = qk.fake_quantize(w, scale, grid, seed=5, **noisy)
    assert_same_bits(a, qk.fake_quantize(w, scale, grid, seed=torch.tensor(5), **noisy))
    assert not torch.equal(a, qk.fake_quantize(w, scale, grid, seed=6, **noisy))
    torch.manual_seed(1)
    b = qk.fake_quantize(w, scale, grid, **noisy)
    assert not torch.equal(b, qk.fake_quantize(w, scale, grid, **noisy))
    torch.manual_seed(1)
    assert_same_bits(b, qk.fake_quantize(w, scale, grid, **noisy))


def test_noise_statistics():
    """Mean, variance, kurtosis, neighbours' correlation and the tail of two million normals, within five sigma."""
    n = 1 << 21
    z = qk.ops.normal(torch.tensor(2024), n).double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4, 64):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n)
    tail = math.erfc(3 / math.sqrt(2))
    assert abs((z.abs() > 3).double().mean() - tail) < 5 * math.sqrt(tail / n)


def test_every_sample_backpropagates():
    for sample in every_sample():
        w, scale = sample.w.clone().requires_grad_(), sample.scale.clone().requires_grad_()
        y = qk.fake_quantize(
            w, scale, sample.grid, group_size=sample.group_size, zero_point=sample.zero_point, dtype=sample.dtype
        )
        y.float().square().sum().backward()
        assert w.grad.dtype == w.dtype
        assert scale.grad.isfinite().all(), sample.name


def test_vmap_over_an_empty_batch():
    """As torch's own functions: an empty result, and gradients that are empty or zero."""
    grid, scale = qk.grids.lsq(4), torch.rand(4, requires_grad=True)
    w = torch.empty(4, 0, 8, requires_grad=True)
    y = torch.vmap(lambda w: qk.fake_quantize(w, scale, grid), in_dims=1)(w)
    assert y.shape == (0, 4, 8)
    dw, ds = torch.autograd.grad(y.sum(), (w, scale))
    assert dw.shape == w.shape
    assert torch.equal(ds, torch.zeros_like(scale))
    # Not the mean: torch cannot divide an empty batch of numbers by a number.
    loss = torch.vmap(lambda z: qk.ops.cross_entropy(z, torch.tensor([0, 1]), reduction="sum"))(torch.empty(0, 2, 5))
    assert loss.shape == (0,)
    packed = qk.PackedWeight.from_float(torch.randn(4, 8), torch.ones(4), grid)
    assert torch.vmap(lambda x: qk.lowbit_linear(x, packed))(torch.empty(0, 3, 8)).shape == (0, 3, 4)
    gradients = torch.vmap(torch.func.grad(lambda w: qk.fake_quantize(w, scale.detach(), grid).sum()))
    assert gradients(torch.empty(0, 4, 8)).shape == (0, 4, 8)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_gradients_of_dequantize_without_elements(shape):
    scale, zero = (torch.ones(shape[0], requires_grad=True) for _ in range(2))
    w = qk.dequantize(torch.empty(shape, dtype=torch.uint8), scale, qk.grids.affine(4), zero_point=zero)
    ds, dz = torch.autograd.grad(w.sum(), (scale, zero))
    assert torch.equal(ds, torch.zeros_like(scale))
    assert torch.equal(dz, torch.zeros_like(zero))
