"""What the documentation site has beside the pages of docs/: pages from elsewhere in the project, and the reference.

mkdocs calls ``on_files`` before it builds, and ``on_page_markdown`` for every page. Links of a page are written for
readers of the repository. Here a link to a file that is no page of the site, such as a result in bench/, leads to a
copy.
"""

from __future__ import annotations

import importlib
import inspect
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: Pages of the site that are files outside docs/.
ELSEWHERE = {
    "index.md": "README.md",
    "bench.md": "bench/README.md",
    "bench-gpu.md": "bench/gpu/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
#: Modules of the reference, in order, each with what it is for.
MODULES = {
    "qatkernels": "What most programs need.",
    "qatkernels.grids": "Quantization grids and schemes.",
    "qatkernels.nn": "Quantized and packed layers, and what is done with models of them.",
    "qatkernels.nn.expert_parallel": "The style of expert parallel for quantized and packed experts.",
    "qatkernels.nn.tensor_parallel": "Styles of torch's tensor parallel for quantized and packed layers.",
    "qatkernels.ops": "The functions under the layers.",
    "qatkernels.methods": "Training methods for your own loop.",
    "qatkernels.formats": "Files of packed models and of other runtimes.",
    "qatkernels.hessian": "Products with the Hessian, its spectrum, sharpness.",
    "qatkernels.plan": "How much of a training to quantize.",
    "qatkernels.trainer": "The reference training loop.",
    "qatkernels.integrations.transformers": "Models and the Trainer of transformers.",
    "qatkernels.backends": "Backends and which of them serves a call.",
    "qatkernels.testing": "What tests of kernels are made with.",
}
_LINK = re.compile(r"(?<!\!)\[([^\[\]]*)\]\(([^()\s]+)\)|(!\[[^\[\]]*\]\()([^()\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from elsewhere, the reference, and the files that pages link to."""
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, text in reference().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for source in sorted(linked()):
        files.append(File.generated(config, f"files/{source}", abs_src_path=str(ROOT / source)))
    shim = Path(__file__).with_name("iframe-worker.js")
    files.append(File.generated(config, "assets/iframe-worker.js", abs_src_path=str(shim)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page for the site."""
    name = page.file.src_uri
    if name.startswith("reference/"):
        return markdown
    source = ELSEWHERE.get(name, f"docs/{name}")
    return _LINK.sub(lambda match: _rewritten(match, name, source), markdown)


def _rewritten(match: re.Match[str], page: str, source: str) -> str:
    text, link, image, picture = match.groups()
    link = link or picture
    target = _target(link, source)
    if target is None:
        return match.group()
    path, _, anchor = target.partition("#")
    if (ROOT / path).is_dir():
        return f"`{path}`" if text is None else text
    site = _on_site(path)
    relative = posixpath.relpath(site, posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")
    return f"{image}{relative})" if image else f"[{text}]({relative})"


def _target(link: str, source: str) -> str | None:
    """Return the file in the project that a link of a page leads to; None if it leads elsewhere."""
    if re.match(r"[a-z]+:|#", link):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _on_site(path: str) -> str:
    """Return where a file of the project is on the site."""
    pages = {source: name for name, source in ELSEWHERE.items()}
    if path in pages:
        return pages[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def linked() -> set[str]:
    """Return the files outside docs/ that pages link to, and that are no pages."""
    found = set()
    pages = [*ELSEWHERE.values(), *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    for source in pages:
        for match in _LINK.finditer((ROOT / source).read_text(encoding="utf-8")):
            target = _target(match[2] or match[4], source)
            path = (target or "").partition("#")[0]
            if path and (ROOT / path).is_file() and _on_site(path).startswith("files/"):
                found.add(path)
    return found


def reference() -> dict[str, str]:
    """Return the pages of the reference by name, in Markdown."""
    pages = {"commands": commands()}
    lines = ["# Python", "", "| module | |", "|---|---|"]
    for module, what in MODULES.items():
        pages[module] = (
            f"# `{module}`\n\n{what}\n\n" + "\n\n".join(f"::: {name}" for name in _documented(module)) + "\n"
        )
        lines.append(f"| [`{module}`]({module}.md) | {what} |")
    pages["index"] = "\n".join(lines) + "\n"
    return pages


def _documented(module: str) -> list[str]:
    """Return the public functions and classes of a module by where they are defined, without modules and constants."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [
        name for name, value in vars(loaded).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]  # fmt: skip
    values = [getattr(loaded, name) for name in names]
    return [f"{v.__module__}.{v.__qualname__}" for v in values if inspect.isfunction(v) or inspect.isclass(v)]


def commands() -> str:
    """Return the help of every command."""
    from qatkernels.cli._main import COMMANDS, parsers

    os.environ["COLUMNS"] = "100"
    parts = ["# Command line", "", "```text", parsers([])[0].format_help().strip(), "```"]
    for name in COMMANDS:
        parts += ["", f"## qatkernels {name}", "", "```text", parsers([name])[1][name].format_help().strip(), "```"]
    return "\n".join(parts) + "\n"
