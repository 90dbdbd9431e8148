"""The two processes that tests share: results come back, and so does whatever goes wrong."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.pair import JobFailed


def total(rank, start):
    os.environ["LEFT_BEHIND"] = os.getcwd()
    os.chdir("/")
    found = torch.tensor([float(start + rank)])
    dist.all_reduce(found)
    return rank, found.item(), torch.rand(1).item(), os.getpid()


def clean(rank):
    return "LEFT_BEHIND" not in os.environ and os.getcwd() != "/", os.getpid()


def raises(rank):
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def unpicklable(rank):
    return lambda: None


def killed(rank):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def hangs(rank):
    if rank == 0:
        time.sleep(1000)


def test_jobs_share_processes_and_leave_nothing(pair):
    first, again = pair.run(total, 3), pair.run(total, 3)
    assert [result[:2] for result in first] == [(0, 7.0), (1, 7.0)]
    assert first == again, "another seed, or another process"
    assert pair.run(clean) == [(True, result[3]) for result in first]


def test_functions_without_a_name_are_refused_at_once(pair):
    with pytest.raises(Exception, match="local object"):
        pair.run(lambda rank: None)
    assert len(pair.run(clean)) == 2


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (raises, r"rank 0 did not end in time and was killed. It was here:[^\0]*in raises\b[^\0]*rank 1 raised\n"
                 r"Traceback [^\0]*in raises\n[^\0]*ValueError: the reason"),
        (unpicklable, r"rank 0 raised\n[^\0]*unpicklable.<locals>[^\0]*rank 1 raised"),
        (killed, "rank 0 ended by SIGKILL"),
        (hangs, r"rank 0 did not end in time[^\0]*in hangs\b"),
    ],
)  # fmt: skip
def test_failures_say_which_rank_and_where(pair, job, message):
    before = [pid for _, pid in pair.run(clean)]
    with pytest.raises(JobFailed, match=rf"test_pair.{job.__name__} failed; .* 2 new processes[^\0]*{message}"):
        pair.run(job, limit=20 if job is not hangs else 5)
    after = [pid for _, pid in pair.run(clean)]
    assert not set(before) & set(after)
