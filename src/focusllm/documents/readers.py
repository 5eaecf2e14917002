"""Files to text: plain text, Markdown and source code as they are, HTML and PDF through their parsers."""

from __future__ import annotations

import codecs
import re
import sys
from pathlib import Path

from focusllm.documents.extracted import Extracted
from focusllm.errors import DocumentError, first_line

BLOCKS = [
    *("address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt"),
    *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr"),
    *("legend", "li", "main", "nav", "ol", "option", "p", "pre", "section", "summary", "table", "tbody", "tfoot"),
    *("thead", "title", "tr", "ul"),
]
"""Elements of HTML that have lines of their own."""
SPACE = "\ufdd0"
"""Stands for white space between words until lines are known. Unicode keeps it from being a character."""
HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
DOCUMENT_SUFFIXES = {".txt", ".md", ".rst", ".tex", ".json", ".csv", ".py", ".pdf", *HTML_SUFFIXES}


def read_text(path: str | Path, encoding: str | None = None) -> str:
    """The text of a file alone, see `read_file`."""
    return read_file(path, encoding).text


def read_file(path: str | Path, encoding: str | None = None) -> Extracted:
    """The text of a file with its parts and remarks; `-` reads standard input.

    Args:
        encoding: of plain text and HTML; None: by its byte order mark, what HTML declares, UTF-8, or detected.

    Raises:
        DocumentError: a missing or unreadable file, one that is not text, bytes that are not in the encoding, or a
            file without any text.
    """
    name = str(path)
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DocumentError(f"there is no file {name}; check the path.") from error
    except IsADirectoryError as error:
        raise DocumentError(f"{name} is a folder; name the files in it.") from error
    except OSError as error:
        raise DocumentError(f"{name} cannot be read ({error.strerror or error}); check its permissions.") from error
    suffix = Path(name).suffix.lower()
    if suffix == ".pdf" or data.startswith(b"%PDF-"):
        text = _from_pdf(name, data)
    else:
        text = decode_text(data, name, encoding or "utf-8")
        if suffix in HTML_SUFFIXES:
            text = _from_html(name, text)
    return Extracted(check_text(text, name))


def check_text(text: str, name: str) -> str:
    """The text itself, if there is any.

    Raises:
        DocumentError: it is empty or white space only, or has halves of characters (lone surrogates).
    """
    if not text.strip():
        raise DocumentError(f"{name} has no text in it ({len(text)} characters of white space); give one with text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        odd = f"{text[error.start]!r} at position {error.start:,}"
        raise DocumentError(f"{name} is not Unicode text: {odd}; give it in UTF-8, or name its encoding.") from error
    return text


def decode_text(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Bytes to text, with a byte order mark removed.

    Raises:
        DocumentError: binary data, an unknown encoding, or bytes that are not in it.
    """
    try:
        codec = codecs.lookup(encoding).name
    except LookupError as error:
        raise DocumentError(f"{encoding!r} is not a known encoding; try utf-8 or latin-1.") from error
    if b"\0" in data[:65536] and not codec.startswith(("utf-16", "utf-32")):
        raise DocumentError(
            f"{name} is not text (it has NUL bytes); give a text, Markdown, HTML, PDF or source file, or an encoding."
        )
    try:
        return data.decode("utf-8-sig" if codec == "utf-8" else codec)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not {encoding}: byte 0x{data[error.start]:02x} at position {error.start:,}; name its encoding "
            f"(for example latin-1)."
        ) from error
    except (LookupError, UnicodeError) as error:  # hex, undefined and others are codecs, but not of text
        raise DocumentError(f"{encoding!r} is not an encoding of text; try utf-8 or latin-1.") from error


def _from_html(name: str, markup: str) -> str:
    """A line for every block, cells of a table with tabs between them; white space as in the source in `pre` alone."""
    from bs4 import BeautifulSoup
    from bs4.element import CData, PreformattedString

    try:
        soup = BeautifulSoup(markup, "html.parser")
    except Exception as error:  # of several kinds, for markup that the parser cannot make sense of
        raise DocumentError(f"{name} is not HTML that can be read ({first_line(error)}).") from error
    for element in soup(["script", "style", "template", "noscript"]):
        element.decompose()
    for piece in soup.find_all(string=True):
        if isinstance(piece, PreformattedString) and not isinstance(piece, CData):  # a comment, a document type
            piece.extract()
        elif piece.find_parent("pre") is None:
            piece.replace_with(re.sub(r"\s+", SPACE, piece))
    for block in soup.find_all(BLOCKS):
        block.insert_before("\n")
        block.insert_after("\n")
    for cell in soup.find_all(["td", "th"]):
        cell.insert_after("\t")
    text = re.sub(f"{SPACE}*\t{SPACE}*", "\t", soup.get_text())
    lines = (line.strip(SPACE).rstrip() for line in text.split("\n"))
    return re.sub(f"{SPACE}+", " ", "\n".join(line for line in lines if line))


def _from_pdf(name: str, data: bytes) -> str:
    import io

    from pypdf import PdfReader

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(f"{name} is protected by a password; save it without one.")
        text = "\n\n".join(page.extract_text() for page in reader.pages)
    except DocumentError:
        raise
    except Exception as error:  # pypdf raises many kinds on damaged or encrypted files
        raise DocumentError(f"{name} is not a PDF that can be read ({error}).") from error
    if not text.strip():
        raise DocumentError(f"{name} has {len(reader.pages)} pages but no text in them (scans?); run OCR on it first.")
    return text
