"""Documents that are zip archives: Word, PowerPoint, spreadsheets, OpenDocument text and EPUB."""

from __future__ import annotations

import io
import posixpath
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from focusllm.documents.encodings import decode
from focusllm.documents.extracted import Extracted, joined
from focusllm.documents.markup import Layout, chapter_text, declared_charset, html_text
from focusllm.errors import DocumentError, first_line

MAX_GROWTH = 200 * 2**20
"""Most bytes that an archive may have more when it is unpacked."""
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""How files of Office begin that are old or encrypted."""
TEXT = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}"
TABLE = "{urn:oasis:names:tc:opendocument:xmlns:table:1.0}"
OFFICE = "{urn:oasis:names:tc:opendocument:xmlns:office:1.0}"
AS_HTML = {
    f"{TEXT}p": "p",
    f"{TEXT}h": "p",
    f"{TEXT}list-item": "li",
    f"{TEXT}line-break": "br",
    f"{TABLE}table": "table",
    f"{TABLE}table-row": "tr",
    f"{TABLE}table-cell": "td",
    f"{TEXT}tracked-changes": "template",
    f"{OFFICE}annotation": "template",
    f"{TEXT}note-citation": "template",
}
"""Elements of OpenDocument by the HTML that is laid out as they are; what is hidden is a template."""


def from_docx(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """Paragraphs, lists, tables and notes in their order."""
    with _opened(name, data):
        mammoth = _library("mammoth", name)
        try:
            found = mammoth.convert_to_html(
                io.BytesIO(data), convert_image=mammoth.images.img_element(lambda image: {}), style_map=DOCX_STYLES
            )
        except Exception as error:  # of many kinds, for a damaged document
            raise _unreadable(name, "a Word document", error) from error
    return joined([("", html_text(name, found.value))])


DOCX_STYLES = "br[type='page'] => br\nbr[type='column'] => br"


def from_pptx(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """A part for every slide: its shapes, tables and the speaker's notes."""
    with _opened(name, data):
        pptx = _library("pptx", name)
        try:
            slides = pptx.Presentation(io.BytesIO(data)).slides
            pieces = [(f"slide {number}", "\n".join(_slide(slide))) for number, slide in enumerate(slides, 1)]
        except Exception as error:
            raise _unreadable(name, "a presentation", error) from error
    return joined(pieces)


def _slide(slide: Any) -> Iterator[str]:
    yield from _shapes(slide.shapes)
    if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) and frame.text.strip():
        yield f"Notes: {_lines(frame.text)}"


def _shapes(shapes: Any) -> Iterator[str]:
    for shape in shapes:
        if hasattr(shape, "shapes"):  # a group
            yield from _shapes(shape.shapes)
        elif getattr(shape, "has_table", False):
            for row in shape.table.rows:
                yield "\t".join(" ".join(cell.text.split()) for cell in row.cells)
        elif shape.has_text_frame and shape.text_frame.text.strip():
            yield _lines(shape.text_frame.text)


def _lines(text: str) -> str:
    return text.replace("\v", "\n").strip()


def from_sheets(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """A part for every sheet, a line for every row; of a formula, the value that was saved."""
    if not data.startswith(OLE):
        with _opened(name, data):
            pass
    calamine = _library("python_calamine", name)
    pieces = []
    try:
        book = calamine.CalamineWorkbook.from_filelike(io.BytesIO(data))
        for title in book.sheet_names:
            rows = ("\t".join(map(_cell, row)).rstrip() for row in book.get_sheet_by_name(title).iter_rows())
            lines = [row for row in rows if row]
            if lines:
                pieces.append((f'sheet "{title}"', "\n".join([title, *lines])))
    except Exception as error:
        raise _unreadable(name, "a spreadsheet", error) from error
    return joined(pieces)


def _cell(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return " ".join(str(value).split())


def from_odt(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """Paragraphs, lists, tables and notes in their order; what was deleted in tracked changes and comments are not."""
    from lxml.etree import XMLParser

    with _opened(name, data) as archive:
        parser = XMLParser(target=_OpenDocument(name), resolve_entities=False, no_network=True)
        try:
            parser.feed(archive.read("content.xml"))
            text = parser.close()
        except DocumentError:
            raise
        except Exception as error:
            raise _unreadable(name, "an OpenDocument text", error) from error
    return joined([("", text)])


class _OpenDocument:
    """Hands the events of OpenDocument on to the layout of HTML.

    White space is said by elements in it; a note stands in brackets in its paragraph.
    """

    def __init__(self, name: str):
        self.layout = Layout(name, 10_000)
        self.notes = 0

    def start(self, tag: str, attributes: Any) -> None:
        if tag == f"{TEXT}s":
            self.layout.data(" ")
        elif tag == f"{TEXT}tab":
            self.layout.data("\t")
        elif tag == f"{TEXT}note-body":
            self.notes += 1
            self.layout.data(" [")
        self.layout.start(self._as_html(tag), attributes)

    def end(self, tag: str) -> None:
        self.layout.end(self._as_html(tag))
        if tag == f"{TEXT}note-body":
            self.notes -= 1
            self.layout.data("]")

    def data(self, text: str) -> None:
        self.layout.data(text)

    def close(self) -> str:
        return self.layout.close()

    def _as_html(self, tag: str) -> str:
        return "span" if self.notes else AS_HTML.get(tag, "span")


def from_epub(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """The chapters in reading order; a part for every place that the table of contents names."""
    with _opened(name, data) as archive:
        try:
            package, folder = _package(archive)
            toc = _contents(archive, package, folder)
            pieces: list[tuple[str, str]] = []
            missing = []
            for path in _spine(package, folder):
                try:
                    page = archive.read(path)
                except KeyError:
                    missing.append(posixpath.basename(path))
                    continue
                pieces += _chapters(name, page, toc.get(path, {}))
        except DocumentError:
            raise
        except Exception as error:
            raise _unreadable(name, "an EPUB", error) from error
    remarks = [f"{', '.join(missing)} cannot be found in it"] if missing else []
    return joined(pieces, remarks, between="\n")


def _package(archive: zipfile.ZipFile) -> tuple[Any, str]:
    """The package document of a book, and the folder that its paths begin in."""
    container = _xml(archive.read("META-INF/container.xml"))
    path = container.find(".//{*}rootfile").get("full-path")
    return _xml(archive.read(path)), posixpath.dirname(path)


def _spine(package: Any, folder: str) -> list[str]:
    items = {item.get("id"): item for item in package.iterfind(".//{*}manifest/{*}item")}
    found = [items[ref.get("idref")] for ref in package.iterfind(".//{*}spine/{*}itemref") if ref.get("idref") in items]
    return [_path(folder, item.get("href")) for item in found if "html" in item.get("media-type", "")]


def _contents(archive: zipfile.ZipFile, package: Any, folder: str) -> dict[str, dict[str, str]]:
    """The table of contents: for each file, titles by anchor ("" is its beginning), from EPUB 3's or EPUB 2's."""
    toc: dict[str, dict[str, str]] = {}
    for item in package.iterfind(".//{*}manifest/{*}item"):
        is_nav = "nav" in item.get("properties", "").split()
        if not is_nav and item.get("media-type") != "application/x-dtbncx+xml":
            continue
        path = _path(folder, item.get("href"))
        if path not in archive.namelist():
            continue
        tree = _xml(archive.read(path))
        if is_nav:
            places = [(link.get("href", ""), link) for link in tree.iterfind(".//{*}nav//{*}a")]
        else:
            points = list(tree.iterfind(".//{*}navPoint"))
            places = [(point.find("{*}content").get("src", ""), point.find("{*}navLabel")) for point in points]
        for target, title in places:
            file, _, anchor = target.partition("#")
            words = " ".join("".join(title.itertext()).split())
            toc.setdefault(_path(posixpath.dirname(path), file), {}).setdefault(unquote(anchor), words)
    return toc


def _chapters(name: str, page: bytes, titles: dict[str, str]) -> list[tuple[str, str]]:
    """The text of a file of a book, divided where chapters begin."""
    markup = decode(page, name, None, declared_charset(page))[0]
    text, places = chapter_text(name, markup, [anchor for anchor in titles if anchor])
    begins = sorted([(places.get(anchor, 0), number, title) for number, (anchor, title) in enumerate(titles.items())])
    if not begins or begins[0][0]:
        begins.insert(0, (0, 0, ""))
    ends = [begin[0] for begin in begins[1:]] + [len(text)]
    return [
        (f'chapter "{title}"' if title else "", text[start:end].strip("\n"))
        for (start, _, title), end in zip(begins, ends, strict=True)
    ]


def _path(folder: str, href: str) -> str:
    return posixpath.normpath(posixpath.join(folder, unquote(href)))


def _xml(data: bytes) -> Any:
    from lxml import etree

    return etree.fromstring(data, etree.XMLParser(resolve_entities=False, no_network=True, recover=True))


def kind_of(data: bytes) -> str:
    """The suffix of the format that an archive has inside, or nothing."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = set(archive.namelist())
            mime = archive.read("mimetype")[:200].decode("latin-1").strip() if "mimetype" in names else ""
    except Exception:  # of many kinds, for a damaged archive; whoever opens it says so
        return ""
    for part, suffix in (("word/", ".docx"), ("ppt/", ".pptx"), ("xl/", ".xlsx")):
        if any(name.startswith(part) for name in names) and "[Content_Types].xml" in names:
            return suffix
    endings = {"epub+zip": ".epub", "opendocument.text": ".odt", "opendocument.spreadsheet": ".ods"}
    return next((suffix for ending, suffix in endings.items() if mime.endswith(ending)), "")


def _opened(name: str, data: bytes) -> zipfile.ZipFile:
    """An archive, after all in it was unpacked once: what it says of its size is so, and is not too much.

    Raises:
        DocumentError: a damaged archive, one with a password, or one that would fill the memory.
    """
    if data.startswith(OLE):
        raise DocumentError(f"{name} is protected by a password, or of an old format; save it again without either.")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        size = sum(member.file_size for member in archive.infolist())
        if size - len(data) > MAX_GROWTH:
            raise DocumentError(
                f"{name} has {size / 2**20:,.0f} MiB when unpacked; at most {MAX_GROWTH // 2**20} MiB more than its "
                f"own {len(data) / 2**20:,.1f} MiB are read."
            )
        if any(member.flag_bits & 1 for member in archive.infolist()):
            raise DocumentError(f"{name} is protected by a password; save it without one.")
        if damaged := archive.testzip():
            raise DocumentError(f"{name} is damaged: {damaged} in it cannot be unpacked.")
    except DocumentError:
        raise
    except Exception as error:  # of many kinds: damaged, or packed in a way that Python does not know
        raise DocumentError(f"{name} is not a document that can be read ({first_line(error)}).") from error
    return archive


def _library(module: str, name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise DocumentError(f"{name} needs the extra documents: pip install 'focusllm[documents]'.") from error


def _unreadable(name: str, what: str, error: Exception) -> DocumentError:
    return DocumentError(f"{name} is not {what} that can be read ({first_line(error)}).")
