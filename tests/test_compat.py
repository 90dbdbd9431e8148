"""What is used of torch's private functions does what this package takes it to do."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from qatkernels import _torch_compat as compat


def test_below_autograd():
    x = torch.ones(2, requires_grad=True)
    assert (x * 2).requires_grad
    with compat.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_in_dispatch_mode():
    class Mode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not compat.in_dispatch_mode()
    with Mode():
        assert compat.in_dispatch_mode()
    assert not compat.in_dispatch_mode()


def test_without_autocast():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with compat.without_autocast():
            assert (x @ x).dtype == torch.float32


def test_any_autocast():
    assert not compat.any_autocast()
    with torch.autocast("cpu", torch.bfloat16):
        assert compat.any_autocast()
        with torch.autocast("cpu", enabled=False):
            assert not compat.any_autocast()
    torch.set_autocast_enabled("cuda", True)
    try:
        assert compat.any_autocast()
    finally:
        torch.set_autocast_enabled("cuda", False)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + compat.any_autocast(), fullgraph=True, backend="eager")
    x = torch.zeros(())
    assert compiled(x) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x) == 1


def test_in_forward_mode():
    assert not compat.in_forward_mode()
    with forward_ad.dual_level():
        assert compat.in_forward_mode()
    assert not compat.in_forward_mode()


def test_transforms():
    seen = []

    def note(x):
        seen.append((compat.in_transform(), compat.innermost_transform_is_jvp(), compat.in_forward_mode()))
        return x.sum()

    x = torch.ones(2)
    note(x)
    torch.func.grad(note)(x)
    torch.func.vmap(note)(x[None])
    torch.func.jvp(note, (x,), (x,))
    torch.func.jvp(torch.func.grad(note), (x,), (x,))
    assert seen[0] == (False, False, False)
    assert [found[:2] for found in seen[1:]] == [(True, False), (True, False), (True, True), (True, False)]
    assert seen[3][2]


def test_is_fake():
    assert not compat.is_fake(torch.ones(2))
    with FakeTensorMode():
        assert compat.is_fake(torch.ones(2))


def test_without_transforms():
    seen = []

    def note(x):
        seen.append(compat.without_transforms(x))
        return x.sum()

    x = torch.ones(2)
    torch.func.vmap(torch.func.grad(note))(x.expand(3, 2))
    assert compat.without_transforms(x) is x
    assert seen[0].shape == (3, 2)
    assert type(seen[0]) is torch.Tensor


def test_is_view():
    x = torch.ones(2)
    assert not compat.is_view(x)
    assert compat.is_view(x[:1])


def test_preserve_version_counter():
    w = torch.ones(2, requires_grad=True)
    y = w.square().sum()  # saves w
    with torch.no_grad():
        w.mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    y = w.square().sum()
    with torch.no_grad(), compat.preserve_version_counter((w,)):
        w.mul_(1.0)
    y.backward()
    assert torch.equal(w.grad, torch.full((2,), 2.0))


def test_dispatch_mode():
    seen = []

    class Mode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen


def test_trees():
    tree = {"a": [1, (2, None)], "b": 3}
    leaves, spec = compat.tree_flatten(tree)
    assert leaves == compat.tree_leaves(tree) == [1, 2, None, 3]
    assert compat.tree_unflatten(leaves, spec) == tree
    assert compat.tree_map(lambda leaf: leaf, tree) == tree


def test_integer_product():
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((32, 48), (48, 16)))
    assert torch.equal(compat.integer_product(a, b), a.int() @ b.int())


def test_assume_constant_result():
    def read():
        reads.append(None)
        return True

    reads = []
    mine, torchs = compat.assume_constant_result(read), torch.compiler.assume_constant_result(lambda: True)
    assert vars(mine) == vars(torchs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1 if mine() else x, fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(torch.zeros(())) == 1
    assert len(reads) == 1  # while it compiled


def joined(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    assert compat.joined_meshes([mesh["dp"], mesh["tp"]]) == mesh


def test_joined_meshes(pair):
    pair.run(joined)
