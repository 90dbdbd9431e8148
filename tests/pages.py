"""Reads a page of a report as strictly as a test needs it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

#: Elements of HTML that have no end.
_VOID = {"meta", "br", "hr", "img", "input", "link"}


def words_of(text: str) -> set[str]:
    """Return the words and numbers of a text, without punctuation."""
    return set(re.split(r"[\s();,:]+", text))


class Page(HTMLParser):
    """A page: its words, how many charts it has, and the classes that it uses.

    Attributes:
        text: all text that a reader sees.
        words: the words of it.
        drawn: number of charts with axes.
        histograms: number of histograms.
        classes: all classes of elements.
    """

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.text, self.drawn, self.histograms, self.classes = "", 0, 0, set[str]()
        self._open: list[str] = []
        source = page.decode()
        assert source.startswith("<!DOCTYPE html>")
        self.feed(source)
        self.close()
        assert not self._open, f"{self._open} are not closed"
        self.words = words_of(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "use", "image", "base"), tag
        for name, value in attrs:
            assert name not in ("src", "href", "xlink:href", "srcset", "action", "style", "data"), (tag, name)
            assert not name.startswith("on"), (tag, name)
            assert "nan" not in (value or "") or name != "d", f"a path of {value}"
            if name == "class":
                classes = set((value or "").split())
                self.classes |= classes
                self.drawn += "chart" in classes
                self.histograms += "histogram" in classes

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"{tag} is closed before it is opened"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            assert not re.search(r"url\(|@import|https?:", data), "the style loads something"
            assert "prefers-color-scheme:dark" in data
            return
        self.text += data + " "


def read_page(page: bytes) -> Page:
    """Return a page, after asserting that every element is closed, and that it loads nothing and runs nothing."""
    return Page(page)
