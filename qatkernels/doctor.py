"""The diagnosis of `qatkernels doctor`: which backend serves which op, what is missing, and the command that fixes it.

The command depends on how the package was installed: a checkout is built again in place, and a wheel without kernels is
replaced by a build from source. How it was installed is read from the files that the installer wrote beside the package
(``direct_url.json`` and ``WHEEL`` of the packaging specifications).
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

#: Kinds of installation, and the phrase that the doctor prints for each.
_KINDS = {
    "checkout": "a checkout, used in place",
    "folder": "a copy of a source folder",
    "git": "a build from a repository",
    "sdist": "a build from a source distribution",
    "wheel": "a wheel",
    "index": "a package of an index",
    "unknown": "files without a record of their installation",
}
#: The command that builds again. Without these options pip would use a cached wheel, which may have been built before
#: torch or the compiler was installed.
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir"


@dataclass(frozen=True)
class Installation:
    """How this package was installed.

    Attributes:
        kind: a key of ``_KINDS``.
        folder: folder of the package.
        source: path or URL that it was installed from, if known.
        pure: whether it was a wheel without compiled kernels; None if it was not a wheel.
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
        """The command that builds the kernels with the torch and the compiler that are installed now."""
        if self.kind == "checkout":
            return f"pip install --no-deps -e {shlex.quote(str(self.source))}"
        if self.kind in ("folder", "git", "sdist") and self.source:
            return f"{_REINSTALL} {shlex.quote(self.source)}"
        if self.kind == "wheel" and self.source:
            sdist = Path(self.source).with_name(f"qatkernels-{__version__}.tar.gz")
            if sdist.is_file():
                return f"{_REINSTALL} {shlex.quote(str(sdist))}"
        return f"{_REINSTALL} --no-binary qatkernels qatkernels=={__version__}"


def installation(folder: Path) -> Installation:
    """Return how a package was installed.

    Args:
        folder: folder of the package, such as ``site-packages/qatkernels``.
    """
    root = folder.parent
    if (root / "setup.py").is_file() and (root / "CMakeLists.txt").is_file():
        return Installation("checkout", folder, str(root))
    # Search beside the package only, because the environment may hold another copy of it.
    distribution = next(iter(importlib.metadata.distributions(name="qatkernels", path=[str(root)])), None)
    if distribution is None:
        return Installation("unknown", folder)
    pure = "root-is-purelib: true" in (distribution.read_text("WHEEL") or "").lower()
    origin: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
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
    """The result of loading the compiled extension.

    Attributes:
        info: how it was built; None if it is not used here.
        error: the error of loading it; None if it is used.
        built_for: the version of torch that it was built for, if that is not the running version.
    """

    info: dict[str, str] | None = None
    error: str | None = None
    built_for: str | None = None


def loaded() -> Extension:
    """Return the result of loading the extension in this process."""
    extension = backends.extension()
    if extension is not None:
        return Extension(extension.build_info())
    return Extension(None, backends.MISSING.get("cpp"), _built_for())


def diagnosis(package: Path | None = None, extension: Extension | None = None) -> dict[str, Any]:
    """Return the diagnosis as JSON-able data.

    Args:
        package: folder of the package to examine; that of this package if None.
        extension: result of loading its extension; that of this process if None.
    """
    installed, extension = installation(package or Path(__file__).parent), extension or loaded()
    versions: dict[str, str | None] = {"qatkernels": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "scipy", "rich", "safetensors", "matplotlib"):
        versions[name] = _version(name)
    missing = dict(backends.MISSING)  # reasons by backend
    if extension.error is not None:
        missing.pop("cpp", None)
        missing = {"cpp": _why_no_kernels(installed, extension), **missing}
    broken = {"cpp": missing["cpp"]} if "cpp" in missing and _modules(installed) else {}
    return {
        "versions": versions,
        "installation": {
            "kind": installed.kind,
            "folder": str(installed.folder),
            "source": installed.source,
            "pure": installed.pure,
        },
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
            name: {"why": reason, "how": cure(name, installed, extension.built_for)} for name, reason in missing.items()
        },
        "broken": broken,
    }


def _modules(installed: Installation) -> list[Path]:
    """Return the files of the extension that this Python would load."""
    names = (installed.folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return [path for path in names if path.exists()]


def _why_no_kernels(installed: Installation, extension: Extension) -> str:
    """Return the reason why the extension is not used here."""
    if extension.built_for:
        return f"the extension was built for torch {extension.built_for}, this is {torch.__version__}"
    if _modules(installed):
        return f"the extension is there and does not load: {extension.error}"
    others = sorted({path.name for path in installed.folder.glob("_C.*") if path.suffix in (".so", ".pyd")})
    if others:
        return f"{', '.join(others)} is there, for another Python than {sys.implementation.cache_tag} on this machine"
    if installed.kind == "checkout":
        return "the extension of this checkout was not built"
    if installed.pure:
        return f"{installed}: torch or a compiler was missing when it was built"
    return f"{installed}, and no extension"


def cure(name: str, installed: Installation, built_for: str | None = None) -> str:
    """Return what to do to get a missing backend.

    Args:
        name: the backend.
        installed: how the package was installed.
        built_for: the version of torch that the extension was built for, if that is not the running version.
    """
    if name == "triton" and torch.version.cuda is None and torch.version.hip is None:
        return f"needs a CUDA build of PyTorch (this is {torch.__version__}); CPU runs do without it"
    if name == "triton":
        return "needs Triton: `pip install triton` (Linux); CPU runs do without it"
    if sys.platform == "win32":
        return "is not built on Windows; under WSL2 it is, as on any Linux"
    needs, reinstall = [], f"`{installed.reinstall}`"
    if name == "cuda":
        if torch.version.cuda is None:
            needs.append(f"a CUDA build of PyTorch (this is {torch.__version__})")
        if shutil.which("nvcc") is None:
            needs.append("nvcc, of the CUDA toolkit")
    chosen = shlex.split(os.environ.get("CXX", ""))[:1]  # setup.py looks for a compiler in the same way
    if not any(map(shutil.which, chosen or ("c++", "g++", "clang++"))):
        needs.append("a C++20 compiler (`apt install g++`, `dnf install gcc-c++`, `xcode-select --install`)")
    steps = [f"needs {' and '.join(needs)}; then {reinstall}" if needs else f"build it: {reinstall}"]
    if name == "cpp" and built_for:
        steps.append(f"or go back to the torch that it was built for: `pip install torch=={built_for}`")
    if installed.kind in ("wheel", "index", "unknown"):
        steps.append("or the same with the path of a source distribution or a checkout")
    return "; ".join(steps)


def _built_for() -> str | None:
    """Return the version of torch that the extension was built for, if that is not the running version."""
    with contextlib.suppress(ImportError):
        from . import _C

        built: str = _C.build_info()["torch"]
        return built if built != torch.__version__ else None
    return None


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def prescription(diagnosis: dict[str, Any]) -> str:
    """Return a diagnosis as text."""
    cpu, ops, entry = diagnosis["cpu"], diagnosis["ops"], diagnosis["installation"]
    width = max(map(len, ops))
    installed = Installation(entry["kind"], Path(entry["folder"]), entry["source"], entry["pure"])
    lines = [f"{name:<12} {version or 'not installed'}" for name, version in diagnosis["versions"].items()]
    lines += ["", f"installed    {installed}"]
    lines += [f"CPU          {cpu['name']}, {cpu['capability']}, {cpu['threads']} threads"]
    lines += [f"CUDA         {diagnosis['cuda'] or 'no device'}"]
    built = diagnosis["extension"]
    lines += [f"extension    {'not there' if built is None else ', '.join(f'{k} {v}' for k, v in built.items() if v)}"]
    if diagnosis["forced_backend"]:
        lines += [f"QATKERNELS_BACKEND forces {diagnosis['forced_backend']!r}"]
    orders = {name: [", then ".join(op["order"][device]) for device in backends.DEVICES] for name, op in ops.items()}
    heads = [f"on {device}" for device in backends.DEVICES]
    widths = [max(map(len, column)) for column in zip(heads, *orders.values(), strict=True)]
    lines += [
        "",
        f"{'op':<{width}}  " + "  ".join(f"{h:<{w}}" for h, w in zip(heads, widths, strict=True)) + "  present",
    ]
    for name, op in ops.items():
        cells = "  ".join(f"{cell:<{w}}" for cell, w in zip(orders[name], widths, strict=True))
        lines += [f"{name:<{width}}  {cells}  {', '.join(op['present'])}"]
    for name, entry in diagnosis["missing"].items():
        lines += ["", f"missing: {name} ({entry['why']})", f"  {entry['how']}"]
    lines += [f"\nBROKEN: {name}: {reason}" for name, reason in diagnosis["broken"].items()]
    return "\n".join(lines)
