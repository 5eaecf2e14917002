"""PDF to text, page by page."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from focusllm.documents.extracted import Extracted, joined, listed
from focusllm.errors import DocumentError, first_line


def from_pdf(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """A part for every page with text; pages without are said."""
    with quiet("pypdf"):
        pages, odd, total = _pages(name, data)
    empty = [number for number, (_, text) in enumerate(pages, 1) if not text.strip() and number not in odd]
    if len(empty) == total:
        raise DocumentError(f"{name} has {total:,} pages but no text in them (scans?); run OCR on it first.")
    if len(odd) + len(empty) == total:
        raise DocumentError(f"{name} is not a PDF that can be read ({next(iter(odd.values()))}).")
    remarks = []
    if empty:
        remarks.append(f"{listed(empty, 'page')} {'has' if len(empty) == 1 else 'have'} no text (scans?)")
    if odd:
        remarks.append(f"{listed(list(odd), 'page')} cannot be read ({next(iter(odd.values()))})")
    return joined(pages, remarks)


def _pages(name: str, data: bytes) -> tuple[list[tuple[str, str]], dict[int, str], int]:
    """(label, text) of all pages, why pages cannot be read, and how many there are."""
    from pypdf import PdfReader

    pages: list[tuple[str, str]] = []
    odd: dict[int, str] = {}
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(f"{name} is protected by a password; save it without one.")
        total = len(reader.pages)
        for number in range(1, total + 1):
            try:
                text = reader.pages[number - 1].extract_text()
            except Exception as error:  # one odd page among many
                text, odd[number] = "", first_line(error)
            pages.append((f"page {number}", text))
    except DocumentError:
        raise
    except Exception as error:  # pypdf raises many kinds on damaged or encrypted files
        raise DocumentError(f"{name} is not a PDF that can be read ({first_line(error)}).") from error
    return pages, odd, total


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Keep what a library says of a file's oddities from the user."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
