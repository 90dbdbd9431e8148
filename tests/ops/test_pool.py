"""Weight-sized results reuse memory, and never memory that something still needs."""

import gc
import os
import threading
import time

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import extension

C = extension()
pytestmark = pytest.mark.skipif(C is None, reason="the pool belongs to the compiled kernels")
GRID = qk.grids.lsq(4)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def empty():
    gc.collect()
    qk.empty_cache()
    yield
    qk.empty_cache()


def quantized(w):
    return qk.fake_quantize(w, GRID.init_scale(w), GRID)


def test_memory_comes_back_only_when_the_last_tensor_is_gone():
    w = torch.randn(512, 1024)
    y = quantized(w)
    address, view = y.data_ptr(), y.view(-1)[10:20]
    expected = view.clone()
    del y
    assert C.cached_bytes() == 0
    other = quantized(w + 1)
    assert other.data_ptr() != address
    assert torch.equal(view, expected)
    del view
    assert C.cached_bytes() == 2 * MIB
    assert quantized(w).data_ptr() == address


def test_what_autograd_keeps_is_not_reused():
    """Two graphs alive at once, the older one used last: its saved weights are intact."""
    x = torch.randn(4, 1024)
    layer = qk.QuantLinear(1024, 512, config=qk.QuantConfig(bits=4))
    first = layer(x.requires_grad_())
    expected = torch.autograd.grad(first.sum(), x, retain_graph=True)[0]
    for _ in range(3):
        with torch.no_grad():
            layer.weight.data = layer.weight.data + 0.01
        layer(x).sum().backward()
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], expected)


def test_a_training_loop_reuses_its_blocks():
    layer = qk.QuantLinear(1024, 1024, config=qk.QuantConfig(bits=2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x, seen = torch.randn(8, 1024), []
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        seen.append(layer.weight.grad.data_ptr())
        optimizer.step()
    assert len(set(seen[1:])) <= 2


@pytest.mark.parametrize(("rows", "kept"), [(512, 4 * MIB), (511, 511 * 4096)])
def test_a_block_of_up_to_twice_the_size_is_used_before_it_is_dropped(rows, kept):
    """Under autocast a bfloat16 weight and its float32 gradient would otherwise evict each other from the pool in
    every step.
    """
    large = quantized(torch.randn(1024, 1024))
    del large
    small = quantized(torch.randn(rows, 1024))
    assert C.cached_bytes() == 0
    del small
    assert C.cached_bytes() == kept


def test_kept_memory_never_exceeds_the_peak_in_use():
    sizes = [(256, 1024), (512, 1024), (1024, 1024), (300, 1024), (700, 1024)]
    peak = 0
    for rows, cols in sizes * 3:
        y = quantized(torch.randn(rows, cols))
        peak = max(peak, y.nbytes)
        del y
        assert C.cached_bytes() <= peak
    qk.empty_cache()
    assert C.cached_bytes() == 0


def test_kept_memory_never_exceeds_the_peak_where_blocks_are_larger_than_their_tensors():
    large = [quantized(torch.randn(1024, 1024)) for _ in range(4)]
    peak = 4 * large[0].nbytes
    del large
    small = [quantized(torch.randn(512, 1024)) for _ in range(4)]  # each in a block of twice its size
    small += [quantized(torch.randn(256, 1024)) for _ in range(8)]
    assert sum(y.nbytes for y in small) == peak
    del small
    assert 0 < C.cached_bytes() <= peak


def test_results_can_be_shared_resized_and_saved(tmp_path):
    y = quantized(torch.randn(512, 1024))
    expected = y.clone()
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt"), expected)
    y.share_memory_()
    assert torch.equal(y, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_another_thread_allocates_runs_kernels():
    """As DataLoader's workers do: on one thread, which torch sets in them."""
    w, stop = torch.randn(512, 1024), threading.Event()
    expected = quantized(w)
    # Results in turn too large and too small for the memory of the one before: the pool frees that, and is busy with it
    # for a good part of each call.
    sizes = [torch.randn(rows, 1024) for rows in (8192, 20480)]
    scales = [GRID.init_scale(large) for large in sizes]

    def allocate():
        while not stop.is_set():
            for large, scale in zip(sizes, scales, strict=True):
                qk.fake_quantize(large, scale, GRID)

    others = [threading.Thread(target=allocate) for _ in range(2)]
    for thread in others:
        thread.start()
    try:
        for _ in range(40):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                right = all(torch.equal(quantized(w), expected) for _ in range(2)) and C.cached_bytes() > 0
                os._exit(0 if right else 1)
            assert _exit_status(child) == 0
    finally:
        stop.set()
        for thread in others:
            thread.join()


def _exit_status(child, seconds=60):
    """Wait for a child; one that hangs is killed, which is a status of its own."""
    for _ in range(seconds * 100):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    return os.waitpid(child, 0)[1]
