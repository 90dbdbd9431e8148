"""What `qatkernels doctor` finds: which backend serves which op, what is missing, and the command that mends it.

The command depends on how the package came here: a checkout is built again in place, a wheel without kernels has to be
replaced by a build from source. That is read from what the installer wrote beside the package (``direct_url.json`` and
``WHEEL``, as the packaging specifications have them).
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import backends
from .version import __version__

#: What the doctor says of a kind of installation.
_KINDS = {
    "checkout": "a checkout, used in place",
    "folder": "a copy of a source folder",
    "git": "a build from a repository",
    "sdist": "a build from a source distribution",
    "wheel": "a wheel",
    "index": "a package of an index",
    "unknown": "files without a record of their installation",
}
#: Built anew: pip would otherwise take the wheel that it made, and kept, before torch or the compiler was there.
_AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir"


@dataclass(frozen=True)
class Installation:
    """How this package was installed.

    Attributes:
        kind: a key of ``_KINDS``.
        folder: the package itself.
        source: path or URL that it was installed from, where there is one.
        pure: whether it was a wheel without compiled kernels; None where no wheel was.
    """

    kind: str
    folder: Path
    source: str | None = None
    pure: bool | None = None

    def __str__(self) -> str:
        pure = {True: ", without compiled kernels", False: ", with compiled kernels", None: ""}[self.pure]
        return _KINDS[self.kind] + (f" ({self.source})" if self.source else "") + pure

    @property
    def reinstall(self) -> str:
        """The command that builds the kernels with the torch and the compiler that are here now."""
        if self.kind == "checkout":
            return f"pip install --no-deps -e {shlex.quote(str(self.source))}"
        if self.kind in ("folder", "git", "sdist") and self.source:
            return f"{_AGAIN} {shlex.quote(self.source)}"
        if self.kind == "wheel" and self.source:
            beside = Path(self.source).with_name(f"qatkernels-{__version__}.tar.gz")
            if beside.is_file():
                return f"{_AGAIN} {shlex.quote(str(beside))}"
        return f"{_AGAIN} --no-binary qatkernels qatkernels=={__version__}"


def installation(folder: Path) -> Installation:
    """Return how a package was installed.

    Args:
        folder: the package's, such as ``site-packages/qatkernels``.
    """
    root = folder.parent
    if (root / "setup.py").is_file() and (root / "CMakeLists.txt").is_file():
        return Installation("checkout", folder, str(root))
    # Only what lies beside the package is about it: the environment may hold another copy.
    beside = next(iter(importlib.metadata.distributions(name="qatkernels", path=[str(root)])), None)
    if beside is None:
        return Installation("unknown", folder)
    pure = "root-is-purelib: true" in (beside.read_text("WHEEL") or "").lower()
    origin: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        origin = json.loads(beside.read_text("direct_url.json") or "{}")
    source = str(origin.get("url", ""))
    if "vcs_info" in origin:
        revision = origin["vcs_info"]
        return Installation("git", folder, f"{revision.get('vcs', 'git')}+{source}@{revision['commit_id']}", pure)
    if source.startswith("file:"):
        source = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    if "dir_info" in origin:
        return Installation("folder", folder, source, pure)
    if "archive_info" in origin:
        return Installation("wheel" if source.endswith(".whl") else "sdist", folder, source, pure)
    return Installation("index", folder, None, pure)


@dataclass(frozen=True)
class Extension:
    """What became of loading the compiled extension.

    Attributes:
        info: how it was built; None if it does not serve here.
        error: what loading it said; None if it serves.
        built_for: the torch that it was built for, if that is not the one that runs.
    """

    info: dict[str, str] | None = None
    error: str | None = None
    built_for: str | None = None


def loaded() -> Extension:
    """Return what became of loading the extension in this process."""
    extension = backends.extension()
    if extension is not None:
        return Extension(extension.build_info())
    return Extension(None, backends.MISSING.get("cpp"), _built_for())


def diagnosis(package: Path | None = None, extension: Extension | None = None) -> dict[str, Any]:
    """Return everything that the doctor knows, as JSON-able data.

    Args:
        package: folder of the package that is examined; this one's if None.
        extension: what became of its extension; this process's if None.
    """
    here, extension = installation(package or Path(__file__).parent), extension or loaded()
    versions: dict[str, str | None] = {"qatkernels": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "scipy", "rich", "safetensors", "matplotlib"):
        versions[name] = _version(name)
    why = dict(backends.MISSING)
    if extension.error is not None:
        why = {"cpp": _why_no_kernels(here, extension), **{name: said for name, said in why.items() if name != "cpp"}}
    broken = {"cpp": why["cpp"]} if "cpp" in why and _modules(here) else {}
    return {
        "versions": versions,
        "installation": {"kind": here.kind, "folder": str(here.folder), "source": here.source, "pure": here.pure},
        "cpu": {
            "name": platform.processor() or platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "forced_backend": os.environ.get("QATKERNELS_BACKEND"),
        "extension": extension.info,
        "ops": {
            name: {device: row[device][0].split(" ")[0] for device in backends.DEVICES}
            | {"order": {device: row[device] for device in backends.DEVICES}, "present": row["present"]}
            for name, row in backends.report().items()
        },
        "missing": {
            name: {"why": reason, "how": cure(name, here, extension.built_for)} for name, reason in why.items()
        },
        "broken": broken,
    }


def _modules(here: Installation) -> list[Path]:
    """Return the files of the extension that this Python would load."""
    names = (here.folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return [path for path in names if path.exists()]


def _why_no_kernels(here: Installation, extension: Extension) -> str:
    """Return why the extension does not serve here, in words that fit the installation."""
    if extension.built_for:
        return f"the extension was built for torch {extension.built_for}, this is {torch.__version__}"
    if _modules(here):
        return f"the extension is there and does not load: {extension.error}"
    others = sorted({path.name for path in here.folder.glob("_C.*") if path.suffix in (".so", ".pyd")})
    if others:
        return f"{', '.join(others)} is there, for another Python than {sys.implementation.cache_tag} on this machine"
    if here.kind == "checkout":
        return "the extension of this checkout was not built"
    return f"{here}: torch or a compiler was missing when it was built" if here.pure else f"{here}, and no extension"


def cure(name: str, here: Installation, built_for: str | None = None) -> str:
    """Return what to do to get a backend that is missing.

    Args:
        name: the backend.
        here: how the package was installed.
        built_for: the torch that the extension was built for, if that is not the one that runs.
    """
    if name == "triton" and torch.version.cuda is None and torch.version.hip is None:
        return f"needs a CUDA build of PyTorch (this is {torch.__version__}); CPU runs do without it"
    if name == "triton":
        return "needs Triton: `pip install triton` (Linux); CPU runs do without it"
    if sys.platform == "win32":
        return "is not built on Windows; under WSL2 it is, as on any Linux"
    needs, again = [], f"`{here.reinstall}`"
    if name == "cuda":
        if torch.version.cuda is None:
            needs.append(f"a CUDA build of PyTorch (this is {torch.__version__})")
        if shutil.which("nvcc") is None:
            needs.append("nvcc, of the CUDA toolkit")
    chosen = shlex.split(os.environ.get("CXX", ""))[:1]  # as setup.py looks for one
    if not any(map(shutil.which, chosen or ("c++", "g++", "clang++"))):
        needs.append("a C++20 compiler (`apt install g++`, `dnf install gcc-c++`, `xcode-select --install`)")
    steps = [f"needs {' and '.join(needs)}; then {again}" if needs else f"build it: {again}"]
    if name == "cpp" and built_for:
        steps.append(f"or go back to the torch that it was built for: `pip install torch=={built_for}`")
    if here.kind in ("wheel", "index", "unknown"):
        steps.append("or the same with the path of a source distribution or a checkout")
    return "; ".join(steps)


def _built_for() -> str | None:
    """Return the torch that the extension was built for if it is not the one that runs."""
    with contextlib.suppress(ImportError):
        from . import _C

        built: str = _C.build_info()["torch"]
        return built if built != torch.__version__ else None
    return None


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def prescription(found: dict[str, Any]) -> str:
    """Return a diagnosis as text."""
    cpu, width, here = found["cpu"], max(map(len, found["ops"])), found["installation"]
    lines = [f"{name:<12} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += ["", f"installed    {Installation(here['kind'], Path(here['folder']), here['source'], here['pure'])}"]
    lines += [f"CPU          {cpu['name']}, {cpu['capability']}, {cpu['threads']} threads"]
    lines += [f"CUDA         {found['cuda'] or 'no device'}"]
    built = found["extension"]
    lines += [f"extension    {'not there' if built is None else ', '.join(f'{k} {v}' for k, v in built.items() if v)}"]
    if found["forced_backend"]:
        lines += [f"QATKERNELS_BACKEND forces {found['forced_backend']!r}"]
    shown = {
        name: [", then ".join(op["order"][device]) for device in backends.DEVICES] for name, op in found["ops"].items()
    }
    heads = [f"on {device}" for device in backends.DEVICES]
    widths = [max(map(len, column)) for column in zip(heads, *shown.values(), strict=True)]
    lines += [
        "",
        f"{'op':<{width}}  " + "  ".join(f"{h:<{w}}" for h, w in zip(heads, widths, strict=True)) + "  present",
    ]
    for name, op in found["ops"].items():
        cells = "  ".join(f"{cell:<{w}}" for cell, w in zip(shown[name], widths, strict=True))
        lines += [f"{name:<{width}}  {cells}  {', '.join(op['present'])}"]
    for name, entry in found["missing"].items():
        lines += ["", f"missing: {name} ({entry['why']})", f"  {entry['how']}"]
    lines += [f"\nBROKEN: {name}: {why}" for name, why in found["broken"].items()]
    return "\n".join(lines)
