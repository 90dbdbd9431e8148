"""torchrun starts a job again after SIGKILL, and it ends with the bits of a job that was not killed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.pair import Group

from .conftest import options, outcome
from .test_parallel import train_one_of_two

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="needs gloo")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("parallel", "rank"), [("ddp", 0), ("fsdp", 1)])
def test_killed_and_started_again(pair: Group, tiny: dict[str, Any], tmp_path: Path, parallel: str, rank: int) -> None:
    settings = {**tiny, "parallel": parallel}
    assert [end for end, _ in pair.run(train_one_of_two, settings)] == ["done", "done"]
    draw = random.Random(rank if os.environ.get("CI") else None)
    death = f"{rank}:{draw.randint(1, tiny['steps'] + tiny['qat_steps'])}"
    again = str(tmp_path / "again")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
         "-m", "tests.killed", death, "train", *options({**settings, "out": again})],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{death}\n{done.stderr}"
    # A second attempt is enough: it reads no address of the first one's processes.
    attempts = [line for line in done.stderr.splitlines() if line.startswith("attempt ")]
    assert attempts == [f"attempt 0: rank {death.replace(':', ' is killed in pass ')}", "attempt 1"], done.stderr
    assert outcome(again) == outcome(settings["out"]), death


def network(*command: str) -> None:
    """Run a command of iproute2."""
    subprocess.run(["ip", *command], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[dict[str, str]]:
    """Yield the addresses of two network namespaces, by name. They reach each other and nothing else."""
    names = [f"qk{os.getpid()}{end}" for end in "ab"]
    hosts = dict(zip(names, ("10.199.0.1", "10.199.0.2"), strict=True))
    try:
        for name in names:
            network("netns", "add", name)
        first, second = ([name, "netns", name] for name in names)
        network("link", "add", *first, "type", "veth", "peer", "name", *second)
        for name, address in hosts.items():
            network("-n", name, "address", "add", f"{address}/24", "dev", name)
            for device in (name, "lo"):
                network("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two hosts on this machine, where that is allowed."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(two_hosts())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make network namespaces: {error.stderr.decode().strip()}")
        yield found


def test_killed_on_one_of_two_hosts(pair: Group, tiny: dict[str, Any], tmp_path: Path, hosts: dict[str, str]) -> None:
    settings = {**tiny, "parallel": "ddp"}
    assert [end for end, _ in pair.run(train_one_of_two, settings)] == ["done", "done"]
    again = str(tmp_path / "again")
    meeting = f"{next(iter(hosts.values()))}:29500"
    nodes = []
    for (name, address), first, death in zip(hosts.items(), (1, 0), ("-", f"*:{tiny['steps'] + 2}"), strict=True):
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
            "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, "--rdzv-id", "job",
            "--rdzv-conf", f"is_host={first}", "--local-addr", address, "--max-restarts", "3",
            "-m", "tests.killed", death, "train", *options({**settings, "out": again}),
        ]  # fmt: skip
        own = {"GLOO_SOCKET_IFNAME": name, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment = {**os.environ, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [node.communicate(timeout=240)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert "is killed in pass" in errors[1]
    assert outcome(again) == outcome(settings["out"])
