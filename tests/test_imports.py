"""What an import needs, and names at their old places."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
import torch

import qatkernels

_WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None  # so that importing it raises ImportError
{code}
"""


def run_without(missing, code):
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(missing=missing, code=code)], capture_output=True, text=True, check=False
    )


def test_methods_need_torch_alone():
    missing = ["numpy", "scipy", "rich", "matplotlib", "safetensors", "transformers", "triton"]
    code = """
import torch
from qatkernels import QuantConfig, quantize_model
from qatkernels.methods import WinQ
model = quantize_model(torch.nn.Sequential(torch.nn.Linear(16, 8)), QuantConfig(2))
winq = WinQ(model, reset_every=1, reset_weight=0.4, noise_std=1e-3)
winq.gradient(lambda: model(torch.ones(2, 16)).sum().backward())
winq.after_step()
"""
    done = run_without(missing, code)
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    """Each of these takes a good part of a second, or more, and is only needed by who has imported it already."""
    heavy = ["torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "scipy", "matplotlib"]
    heavy += [] if torch.version.cuda or torch.version.hip else ["triton"]
    code = "import torch\nbefore = set(sys.modules)\nimport qatkernels, qatkernels.methods"
    done = run_without([], f"{code}\nprint(*[name for name in {heavy} if name in sys.modules.keys() - before])")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("missing", "code", "extra"),
    [
        ("rich", "import qatkernels.trainer", "train"),
        ("matplotlib", "import qatkernels.plan.plot", "plot"),
        ("scipy", "from qatkernels.plan import fit; fit._scipy_optimize()", "plan"),
        ("transformers", "import qatkernels.integrations.transformers", "hf"),
    ],
)
def test_a_missing_package_names_its_extra(missing, code, extra):
    done = run_without([missing], code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("qatkernels.extras.MissingExtraError")
    assert f"pip install 'qatkernels[{extra}]'" in last


def test_reports_need_no_matplotlib():
    code = "import qatkernels.trainer.spectra, qatkernels.trainer.report, qatkernels.cli.plan, bench.cli"
    done = run_without(["matplotlib"], code)
    assert done.returncode == 0, done.stderr


def test_a_command_without_its_extra_is_one_line():
    done = run_without(["rich"], "import sys\nfrom qatkernels.cli import main\nsys.exit(main(['train', '--help']))")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("pip install 'qatkernels[train]'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("qatkernels.train", "WinQ", "qatkernels.methods"),
        ("qatkernels.train", "SQuAT", "qatkernels.methods"),
        ("qatkernels.train", "TrainConfig", "qatkernels.trainer"),
        ("qatkernels.train.schedules", "wsd", "qatkernels.methods.schedules"),
        ("qatkernels.train.hf", "WinQCallback", "qatkernels.integrations.transformers"),
        ("qatkernels.nn", "save_packed", "qatkernels.formats"),
        ("qatkernels.grid", "lsq", "qatkernels.grids"),
    ],
)
def test_old_places_still_work(old, name, new):
    if "transformers" in new:
        pytest.importorskip("transformers")
    with pytest.warns(DeprecationWarning, match=f"{old}.{name} is now in {new}"):
        found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), name)


def test_a_module_at_its_old_place():
    with pytest.warns(DeprecationWarning, match=r"qatkernels\.train\.phases is now qatkernels\.trainer\.phases"):
        from qatkernels.train import phases
    assert phases is importlib.import_module("qatkernels.trainer.phases")


def packages():
    """Return every package of qatkernels by name, with the names of its modules."""
    found = {"qatkernels": qatkernels.__path__}
    for module in pkgutil.walk_packages(qatkernels.__path__, "qatkernels."):
        if module.ispkg:
            found[module.name] = importlib.import_module(module.name).__path__
    return {name: [module.name for module in pkgutil.iter_modules(path)] for name, path in found.items()}


PACKAGES = packages()


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_no_function_hides_a_module(name):
    """Otherwise ``package.name`` is the function or the module, depending on what was imported last."""
    package = importlib.import_module(name)
    hidden = [module for module in PACKAGES[name] if inspect.isroutine(vars(package).get(module))]
    assert not hidden, f"{name} has functions of the names of its modules: rename the files, as in _{hidden[0]}.py"


def test_packages_are_found():
    assert {"qatkernels", "qatkernels.nn", "qatkernels.hessian", "qatkernels.cli", "qatkernels.ops"} <= PACKAGES.keys()
    assert "_pack_model" in PACKAGES["qatkernels.nn"]
