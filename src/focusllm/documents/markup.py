"""HTML to text: a line for every block, a row of a table on one line; markup is read as events, without a tree."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from focusllm.documents.encodings import decode
from focusllm.documents.extracted import Extracted, joined
from focusllm.errors import DocumentError

BLOCKS = frozenset(
    [
        *("address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header"),
        *("hr", "legend", "li", "main", "nav", "ol", "option", "p", "pre", "section", "summary", "table", "tbody"),
        *("tfoot", "thead", "title", "tr", "ul"),
    ]
)
"""Elements of HTML that have lines of their own."""
HIDDEN = frozenset(["script", "style", "template", "noscript"])
MAX_WORK = 5 * 10**9
"""Most of bytes times nesting: an end tag is looked for among all open elements, 6 ns each, every 4 bytes."""
PIECE = 2**15
"""Bytes handed to the parser at once: it moves what is left of them for every event."""
DECLARED = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{2,40})|^\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([\w.:-]{2,40})""",
    re.IGNORECASE,
)
ENTITY = re.compile(r"&(\w{2,32});")
XML_ENTITIES = {"amp", "lt", "gt", "quot", "apos"}
ANCHOR = "\ufdd0"
"""Stands around the number of an anchor until lines are known. Unicode keeps it from being a character."""


def from_html(name: str, data: bytes, encoding: str | None) -> Extracted:
    """A page, in the encoding that it declares."""
    text, remarks = decode(data, name, encoding, declared_charset(data))
    return joined([("", html_text(name, text.replace("\0", "")))], remarks)


def declared_charset(data: bytes) -> str:
    """The encoding that a page names in its first KiB, or nothing."""
    found = DECLARED.search(data[:1024])
    return (found[1] or found[2]).decode() if found else ""


def html_text(name: str, markup: str) -> str:
    """The text of a page.

    Raises:
        DocumentError: markup that is nested too deep for its length.
    """
    from lxml.etree import HTMLParser

    data = markup.encode("utf-8", "replace")
    return _parsed(HTMLParser, data, Layout(name, MAX_WORK // max(len(data), 1)))


def chapter_text(name: str, markup: str, anchors: Collection[str]) -> tuple[str, dict[str, int]]:
    """The text of a file of a book without its head, and the character at which each anchor (an `id`) stands.

    It is XHTML, in which `<i/>` is a whole element; as HTML the rest of the file would be in it. Where it is not
    well-formed it is read as HTML all the same.
    """
    from lxml.etree import HTMLParser, XMLParser, XMLSyntaxError

    markup = ENTITY.sub(lambda found: found[0] if found[1] in XML_ENTITIES else html.unescape(found[0]), markup)
    data = markup.replace(ANCHOR, "").encode("utf-8", "replace")
    numbers = {anchor: number for number, anchor in enumerate(anchors)}
    depth = MAX_WORK // max(len(data), 1)
    try:
        text = _parsed(XMLParser, data, Layout(name, depth, {*HIDDEN, "head"}, numbers), resolve_entities=False)
    except XMLSyntaxError:
        text = _parsed(HTMLParser, data, Layout(name, depth, {*HIDDEN, "head"}, numbers))
    return _without_anchors(text, list(anchors))


def _parsed(kind: Any, data: bytes, layout: Layout, **settings: Any) -> str:
    if not data.strip():
        return ""
    parser = kind(target=layout, huge_tree=True, encoding="utf-8", no_network=True, **settings)
    for start in range(0, len(data), PIECE):
        parser.feed(data[start : start + PIECE])
    text: str = parser.close()
    return text


class Layout:
    """Takes the events of a parser and gives lines.

    White space is one space between words, but as in the source inside `pre`. The cells of a row stand on one line with
    tabs between them, unless the row lays out a page: then it has one cell, or holds a table or `pre`.
    """

    def __init__(
        self,
        name: str,
        max_depth: int,
        hidden: Collection[str] = HIDDEN,
        anchors: Mapping[str, int] = MappingProxyType({}),
    ):
        self.name = name
        self.max_depth = max_depth
        self.hides = hidden
        self.anchors = anchors
        self.lines: list[str] = []  # of the whole, or of the cell that is open
        self.words: list[str] = []  # of the line that is open
        self.tables: list[_Row | None] = []  # the row that is open in each open table
        self.depth = self.hidden = self.pre = 0

    def start(self, tag: str, attributes: Any) -> None:
        """An element begins."""
        tag = tag.rpartition("}")[2]  # in XHTML it has a namespace
        self.depth += 1
        if self.depth > self.max_depth:
            raise DocumentError(f"{self.name} cannot be read: over {self.max_depth:,} elements lie inside each other.")
        if tag in self.hides:
            self.hidden += 1
        elif tag in ("td", "th"):
            self._open_row()
            self.lines = self.tables[-1].add_cell()  # type: ignore[union-attr]
        elif tag in BLOCKS:
            self.end_line()
        if tag == "table":
            self._apart()
            self.tables.append(None)
        elif tag == "tr":
            self._close_row()
            self._open_row()
        elif tag == "pre":
            self._apart()
            self.pre += 1
        if self.anchors and (anchor := attributes.get("id") or attributes.get("name")) in self.anchors:
            self.words.append(f"{ANCHOR}{self.anchors[anchor]}{ANCHOR}")

    def end(self, tag: str) -> None:
        """An element ends."""
        tag = tag.rpartition("}")[2]
        self.depth -= 1
        if tag in self.hides:
            self.hidden -= 1
        elif tag in ("td", "th"):
            self.end_line()
            if self.tables and (row := self.tables[-1]):
                self.lines = row.around
        elif tag in BLOCKS:
            self.end_line()
        if tag == "pre":
            self.pre -= 1
        elif tag == "tr" and self.tables:
            self._close_row()
        elif tag == "table" and self.tables:
            self._close_row()
            self.tables.pop()

    def data(self, text: str) -> None:
        """Characters."""
        if self.hidden:
            return
        if not self.pre:
            self.words.append(text)
            return
        first, *others = text.split("\n")
        self.words.append(first)
        for line in others:
            self.end_line()
            self.words.append(line)

    def close(self) -> str:
        """The text."""
        while self.tables:
            self._close_row()
            self.tables.pop()
        self.end_line()
        return "\n".join(self.lines)

    def end_line(self) -> None:
        """A block begins or ends."""
        line = "".join(self.words)
        self.words.clear()
        line = line.rstrip() if self.pre else " ".join(line.split())
        if line:
            self.lines.append(line)

    def _open_row(self) -> None:
        self.end_line()
        if not self.tables:  # a row without a table
            self.tables.append(None)
        if self.tables[-1] is None:
            self.tables[-1] = _Row(self.lines)

    def _close_row(self) -> None:
        self.end_line()
        if self.tables and (row := self.tables[-1]):
            self.lines = row.around
            self.lines += row.text()
            self.tables[-1] = None

    def _apart(self) -> None:
        if self.tables and (row := self.tables[-1]):
            row.is_layout = True


class _Row:
    """A row of a table while it is read."""

    def __init__(self, around: list[str]):
        self.around = around  # the lines that the row will follow
        self.cells: list[list[str]] = []
        self.is_layout = False

    def add_cell(self) -> list[str]:
        self.cells.append([])
        return self.cells[-1]

    def text(self) -> list[str]:
        if self.is_layout or len(self.cells) < 2:
            return [line for cell in self.cells for line in cell]
        line = "\t".join(" ".join(cell) for cell in self.cells).rstrip()
        return [line] if line else []


def _without_anchors(text: str, anchors: list[str]) -> tuple[str, dict[str, int]]:
    """Anchors taken out of a text, with their places; one that has a line of its own goes with the line."""
    places: dict[str, int] = {}
    pieces: list[str] = []
    length = done = 0
    for mark in re.finditer(f"(?m)^{ANCHOR}(\\d+){ANCHOR}(?:\n| |$)|{ANCHOR}(\\d+){ANCHOR}", text):
        pieces.append(text[done : mark.start()])
        length += len(pieces[-1])
        done = mark.end()
        places.setdefault(anchors[int(mark[1] or mark[2])], length)
    return "".join([*pieces, text[done:]]), places
