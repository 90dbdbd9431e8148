"""A call in a process of its own, for what is measured of processes and for libraries that may die."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a fresh process with as many threads.

    Args:
        function: of a module; it and ``args`` are pickled.
        args: what it is called with.

    Raises:
        concurrent.futures.process.BrokenProcessPool: if the process dies.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call, torch.get_num_threads(), function, args).result()


def _call(threads: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    return function(*args)
