"""The documentation site: every page is in it, and every link of it leads somewhere without a network."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[1]


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") != "canonical":
            self.loaded.append(values.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    out = tmp_path_factory.mktemp("site")
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # an advertisement
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "WARNING" not in process.stderr, process.stderr
    return out


def test_every_document_is_in_the_navigation(site: Path) -> None:
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= named
    assert all((site / name).with_suffix(".html").exists() for name in named)


def test_links_lead_somewhere(site: Path) -> None:
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the root of a server
            continue
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            known = pages.get(target)
            if not target.is_file() or (known is not None and unquote(parts.fragment) not in known.anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = Links(path.read_text(encoding="utf-8")).loaded
        assert [link for link in loaded if urlsplit(link).netloc] == [], path


def test_the_reference_has_every_public_name(site: Path) -> None:
    hooks = runpy.run_path(str(ROOT / "docs" / "_site" / "hooks.py"))
    for module in hooks["MODULES"]:
        loaded = importlib.import_module(module)
        text = (site / "reference" / f"{module}.html").read_text(encoding="utf-8")
        values = {name: getattr(loaded, name) for name in getattr(loaded, "__all__", ())}
        names = [n for n, value in values.items() if inspect.isfunction(value) or inspect.isclass(value)]
        assert [name for name in names if f'.{name}"' not in text] == [], module
    assert "qatkernels train" in (site / "reference" / "commands.html").read_text()
