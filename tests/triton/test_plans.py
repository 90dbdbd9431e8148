"""Calls that are replayed from a plan launch what Triton itself would, with a driver that launches nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from qatkernels.backends import IMPLS, load_backend

load_backend("triton")
ROOT = Path(__file__).parents[2]
#: Ops whose launchers compute with torch too, for which there is no plan.
COMPUTING = ("fake_quantize_dual", "fake_quantize_jvp", "gram_schmidt", "perturbation_norms", "quant_linear_dual")

BEGIN = """
import collections, json, random, sys
import torch
from bench.gpu import fake_driver
fake_driver.install((9, 0), compiling=False)
import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.ops._op import OPS
from qatkernels.backends.triton import _plans

log, wrong, counts = [], [], collections.Counter()

def note(kernel, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
    log.append((kernel, (x, y, z), stream, function, metadata, args))

fake_driver._Counted.run = note

def addresses(launches, given):
    '''Return the launches with every tensor that was given as its address, and every other as how aligned that is.'''
    known = {t.data_ptr() for t in given if isinstance(t, torch.Tensor)}
    found = []
    for kernel, *rest, args in launches:
        args = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]  # of an empty one it is 0
        for i, a in enumerate(args):
            if type(a) is int and a > 2**40:
                args[i] = a if a in known else f'new, aligned to {a % 16}'
        found.append((kernel, *rest, args))
    return found

def launched(call, args):
    log.clear()
    out = call(*args)
    return addresses(log, args), out

def described(out):
    outputs = out if isinstance(out, tuple) else (out,)
    return [t if t is None else (t.shape, t.dtype, t.stride(), t.device) for t in outputs]

def compared(name, planned):
    '''Return an implementation that calls Triton's own way, then thrice with plans.'''
    def call(*args):
        wanted, out = launched(planned.impl, args)
        before = len(planned.plans)
        key = planned.key(0, args)[0]
        for again in range(3):  # as Triton does, recorded, replayed
            found, result = launched(planned, args)
            if found != wanted or described(result) != described(out) or type(result) is not type(out):
                wrong.append([name, again, repr(wanted)[:300], repr(found)[:300]])
        counts['replayed' if isinstance(planned.plans[key], _plans.Plan) else 'not replayed', name] += 1
        return out
    return call
"""

EVERY_OP = """
from qatkernels.testing.checks import every_check
jobs = list(every_check(torch.device('cpu')))
random.Random(0).shuffle(jobs)
for check in jobs:
    name = f'{check.op}_out' if OPS[check.op].outputs else check.op
    for form in {name, check.op}:
        if 'triton' not in IMPLS[form]:  # the reference serves GPUs there
            continue
        call = compared(form, IMPLS[form]['triton'])
        inputs = len(OPS[check.op].parameters)
        try:  # a check gives outputs; nothing is computed, and a result of nothing may be refused
            check.run(call if form == name else lambda *args: call(*args[:inputs]))
        except Exception:
            pass
"""

ALIKE = """
from qatkernels.testing.samples import make
grid = qk.grids.lsq(4)

def linear(tokens=1, cols=256, dtype=torch.bfloat16, group=None, bias=None, act=None, offset=0, constants=None):
    rows = 64
    x = torch.zeros(tokens * cols + offset, dtype=dtype)[offset:].view(tokens, cols)
    packed, scale = torch.zeros(rows, cols // 2, dtype=torch.uint8), torch.ones(rows, cols // group if group else 1)
    return x, packed, scale, None, bias, None, constants or list(grid.constants), grid.code_min, 4, act

zero = list(grid.constants)
zero[2] = 0.0
calls = {
    'alike': linear(),
    'alike again': linear(),
    'more': linear(5),
    'another tile': linear(100),
    'float32': linear(dtype=torch.float32),
    'not aligned': linear(offset=1),
    'aligned to 16': linear(offset=8),
    'one column less aligned': linear(cols=264),
    'groups': linear(group=32),
    'bias': linear(bias=torch.zeros(64)),
    'another bias': linear(bias=torch.zeros(64, dtype=torch.bfloat16)),
    'bias not aligned': linear(bias=torch.zeros(65)[1:]),
    'integers': linear(act=8),
    'zero': linear(constants=zero),
    'minus zero': linear(constants=[-v if v == 0 else v for v in zero]),
    'strided': (torch.zeros(4, 512, dtype=torch.bfloat16)[:, ::2], *linear(4)[1:]),
    'transposed': (torch.zeros(256, 4, dtype=torch.bfloat16).T, *linear(4)[1:]),
}
planned = IMPLS['lowbit_linear']['triton']
for turn in range(3):
    for name in random.Random(turn).sample(sorted(calls), len(calls)):
        compared(name, planned)(*calls[name])
counts['plans', ''] = len(planned.plans)
same = make(grid, (64, 256), torch.float32).args('fake_quantize_backward')
compared('one tensor twice', IMPLS['fake_quantize_backward']['triton'])(same[1], *same[1:])
compared('two tensors', IMPLS['fake_quantize_backward']['triton'])(*same)
"""

END = """
print(json.dumps([wrong[:3], len(wrong), [(*k, v) for k, v in counts.items()]]))
"""


def run(script, *options, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *options, "-c", BEGIN + script + END]
    process = subprocess.run(
        command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    wrong, number, counts = json.loads(process.stdout.splitlines()[-1])
    assert number == 0, wrong
    return {(kind, name): count for kind, name, count in counts}


@pytest.mark.slow
def test_every_op_launches_what_triton_would():
    """Every op and form: the same compiled kernels with the same arguments, and results of the same kind."""
    counts = run(EVERY_OP, "-O")
    replayed, others = ({name for kind, name in counts if kind == k} for k in ("replayed", "not replayed"))
    assert others - replayed == {f"{op}{form}" for op in COMPUTING for form in ("", "_out")}
    assert replayed | others == {name for name in IMPLS if "triton" in IMPLS[name]}


def test_calls_are_alike_only_if_triton_takes_them_for_alike():
    counts = run(ALIKE)
    assert {name for kind, name in counts if kind == "not replayed"} == {"strided", "transposed"}
    # Of 17 calls three are like another one: a twin, the same remainder of an address, a zero that was there.
    assert counts["plans", ""] == 14


def test_where_there_are_no_plans():
    """In Triton's interpreter and with another version of Triton an implementation is what it was."""
    script = """
import triton, sys
triton.__version__ = sys.argv[1]
import qatkernels as qk
from qatkernels.backends import IMPLS, load_backend
load_backend("triton")
print(type(IMPLS["fake_quantize"]["triton"]).__name__)
"""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for version, environment, kind in (
        ("3.6.0", {}, "Planned"), ("3.6.0", {"TRITON_INTERPRET": "1"}, "method"), ("3.7.1", {}, "method"),
    ):  # fmt: skip
        command = [sys.executable, "-W", "ignore", "-c", script, version]
        process = subprocess.run(command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True)
        assert process.stdout.strip() == kind, process.stderr


HOOKS = """
from qatkernels.testing.samples import make
from triton import knobs
args = make(qk.grids.lsq(4), (64, 256), torch.float32).args('fake_quantize')
planned, seen = IMPLS['fake_quantize']['triton'], []
planned(*args)
planned(*args)
hook = lambda metadata: seen.append(metadata)
fake_driver._Counted.run = lambda *args: args[8] and args[8](args[7])
planned(*args)
knobs.runtime.launch_enter_hook.add(hook)
planned(*args)
knobs.runtime.launch_enter_hook.remove(hook)
planned(*args)
assert len(seen) == 1, seen
"""


def test_hooks_of_profilers_are_called():
    """Where one is set, launches are Triton's own."""
    run(HOOKS)


MANY = """
from qatkernels.testing.samples import make
_plans.MOST = 3
planned = IMPLS['fake_quantize']['triton']
for rows in (1, 2, 3, 4, 5, 2, 5):
    planned(*make(qk.grids.lsq(4), (rows, 64), torch.float32).args('fake_quantize'))
    assert len(planned.plans) <= 3
assert [key[2][0] for key in planned.plans] == [4, 5, 2], planned.plans.keys()
"""


def test_the_oldest_plan_makes_room():
    run(MANY)


def test_every_argument_is_in_the_key():
    """A plan that did not look at one would launch the kernel of another call."""
    import torch

    from qatkernels.backends import IMPLS
    from qatkernels.backends.triton._plans import Planned
    from qatkernels.ops._op import OPS

    values = {
        "Tensor": (torch.ones(4), torch.ones(8)), "Tensor?": (torch.ones(4), None), "float": (0.5, 0.25),
        "float?": (0.5, 0.25, None), "float[]": ([1.0, 2.0], [1.0, 3.0]), "int": (1, 2), "int?": (1, 2, None),
        "bool": (True, False), "ScalarType?": (torch.float32, torch.bfloat16, None),
        "ScalarType": (torch.float32, torch.int8),
    }  # fmt: skip
    assert "triton" in IMPLS["perturb_"]
    for op in (op for op in OPS.values() if "triton" in IMPLS[op.name]):
        kinds = [kind.replace("(a!)", "").replace("(b!)", "") for kind in op.parameters.values()]
        planned, first = Planned(op, lambda *args: None), [values[kind][0] for kind in kinds]
        for i, kind in enumerate(kinds):
            keys = [planned.key(0, tuple([*first[:i], value, *first[i + 1 :]]))[0] for value in values[kind]]
            assert len(set(keys)) == len(keys), (op.name, list(op.parameters)[i])
