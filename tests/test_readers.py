"""Files to text, and what is not text."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest
from pypdf import PdfWriter

from focusllm import DocumentError
from focusllm.documents import archives
from focusllm.documents.extracted import joined, listed
from focusllm.documents.readers import DOCUMENT_SUFFIXES, FORMATS, check_text, decode_text, read_file, read_text

CASES = Path(__file__).parent / "data" / "cases"


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def pdf(text: str | None) -> bytes:
    """A PDF of one page, by hand: pypdf writes no text."""
    stream = b"" if text is None else f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources "
        b"<< /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, 2)
    for number, content in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    start = out.tell()
    out.write(b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    out.write(b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start)
    return out.getvalue()


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.unknown", "noname"])
def test_plain_text(tmp_path: Path, name: str) -> None:
    text = "naïve café 世界\nline two\n"
    assert read_text(write(tmp_path, name, text.encode())) == text


def test_byte_order_mark_and_other_encodings(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, "bom.txt", b"\xef\xbb\xbftext")) == "text"
    assert read_text(write(tmp_path, "latin.txt", "café".encode("latin-1")), "latin-1") == "café"
    for name in ("utf-16", "utf16", "UTF_16"):
        assert read_text(write(tmp_path, "wide.txt", "café".encode("utf-16")), name) == "café"


def test_html(tmp_path: Path) -> None:
    page = (
        b"<html><head><style>p {}</style><script>var x;</script></head><body><h1>Title</h1><p>One &amp; two</p></body>"
    )
    assert read_text(write(tmp_path, "page.html", page)) == "Title\nOne & two"


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>H<sub>2</sub>O is <b>not</b> un<i>believ</i>able,\n  is it?</p>", "H2O is not unbelievable, is it?"),
        ("<div>one<p>two</p>three<br>four</div><ul><li>five<li>six</ul>", "one\ntwo\nthree\nfour\nfive\nsix"),
        ("<pre>def f():\n    return 1\n</pre>done", "def f():\n    return 1\ndone"),
        ("<table><tr>\n <td>a</td>\n <td>b</td>\n</tr>\n<tr><td> </td><td></td></tr> <tr><td>c</td></tr>", "a\tb\nc"),
        ("<!DOCTYPE html><html><!-- not shown --><body><?php no ?><p>Hi</p></body></html>", "Hi"),
        ("<p>one</p><![foo bar<p>two</p>", "one\ntwo"),
        ("<table><tr><td>a<p>b</p></td><td>1<br>2</td></tr></table>", "a b\t1 2"),
        ("<table><tr><td><h1>A page</h1><p>laid out</p></td></tr></table>", "A page\nlaid out"),
        ("<table><tr><td>menu</td><td><table><tr><td>a</td><td>b</td></tr></table></td></tr></table>", "menu\na\tb"),
        ("<tr><td>no</td><td>table</td></tr>", "no\ttable"),
    ],
)
def test_html_has_a_line_for_every_block(tmp_path: Path, markup: str, text: str) -> None:
    assert read_text(write(tmp_path, "page.html", markup.encode())) == text


def test_pdf(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, "page.pdf", pdf("Hello from a page"))).strip() == "Hello from a page"
    assert read_text(write(tmp_path, "no-suffix", pdf("Hello"))).strip() == "Hello"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "empty.txt has no text in it"),
        ("blank.txt", b" \n\t \n", "blank.txt has no text in it"),
        ("random.txt", bytes(range(256)) * 20, "random.txt is not text but binary data"),
        ("program", b"\x7fELF\x02\x01\x01" + bytes(64) + b"\x48\x8d\x3d\x01\x0e\x02" * 40, "not text but binary"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(0, 256, 3)) * 9, "not text but binary"),
        ("odd.html", b"<![foo bar", "odd.html has no text in it"),
        ("odd.docx", b"no archive", "odd.docx is not a document that can be read"),
        ("old.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "protected by a password, or of an old format"),
        ("odd.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "odd.xls is not a spreadsheet that can be read"),
        ("odd.ipynb", b"[" * 100_000, "odd.ipynb is not a notebook that can be read"),
        ("odd.epub", b"PK\3\4" + bytes(100), "odd.epub is not a document that can be read"),
        ("broken.pdf", b"%PDF-1.4 nothing here", "not a PDF that can be read"),
        ("scan.pdf", pdf(None), "1 pages but no text"),
        ("empty.html", b"<html><script>x</script></html>", "has no text in it"),
    ],
)
def test_not_text(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        read_text(write(tmp_path, name, data))


def test_protected_pdf(tmp_path: Path) -> None:
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    with pytest.raises(DocumentError, match="protected by a password"):
        read_text(tmp_path / "locked.pdf")


def test_unknown_encoding(tmp_path: Path) -> None:
    for name in ("utf-99", "ut\0f", "ut\nf"):
        with pytest.raises(DocumentError, match="not a known encoding") as caught:
            read_text(write(tmp_path, "a.txt", b"x"), name)
        assert len(str(caught.value).splitlines()) == 1
    for codec in ("hex", "undefined"):
        with pytest.raises(DocumentError, match="is not an encoding of text"):
            read_text(write(tmp_path, "a.txt", b"x"), codec)


def test_missing_folder_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DocumentError, match="there is no file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(DocumentError, match="is a folder"):
        read_text(tmp_path)
    path = write(tmp_path, "secret.txt", b"x")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DocumentError, match="Permission denied"):
        read_text(path)


def test_halves_of_characters_are_no_text() -> None:
    with pytest.raises(DocumentError, match=r"the text is not Unicode text: '\\udce9' at position 3; give it in UTF-8"):
        check_text("caf\udce9", "the text")


@pytest.mark.parametrize(
    ("name", "text", "remarks"),
    [
        ("aes.pdf", "The valve broke at noon", ()),
        ("rc4.pdf", "The valve broke at noon", ()),
        ("math.pdf", "Let \U0001d400 be a matrix\n\nplain words", ()),
        ("mixed.pdf", "Contents of this bundle", ("pages 2, 3 and 4 have no text (scans?)",)),
        ("cells.html", "Name\tAge\nAnn\t41\nBob\t17 years", ()),
        ("shift_jis.html", "世界の本", ("read as shift_jis, as it declares",)),
        ("powershell.txt", "The pump broke", ("read as UTF-16, by its byte order mark",)),
        ("powershell_zh.txt", "世界您好", ("read as UTF-16, by its byte order mark",)),
        ("crash.log", "10:01 ok\n\n10:02 pump broke\n", ("4 NUL bytes left out",)),
    ],
)
def test_files_as_people_have_them(name: str, text: str, remarks: tuple[str, ...]) -> None:
    found = read_file(CASES / name)
    assert found.text == text
    assert found.remarks == remarks


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        ("windows-1252", "café noir"),
        ("windows-1252", "He said “no” – it’s a pump that broke on Tuesday."),
        ("windows-1251", "Все счастливые семьи похожи друг на друга."),
        ("euc-jp", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"),
        ("gb18030", "道可道，非常道。名可名，非常名。无名天地之始；有名万物之母。"),
        ("utf-16-le", "no mark, all ASCII"),
        ("utf-16-be", "no mark, all ASCII"),
    ],
)
def test_encodings_are_detected(tmp_path: Path, codec: str, text: str) -> None:
    found = read_file(write(tmp_path, "a.txt", ("Plain line.\n" * 50 + text).encode(codec)))
    assert found.text == "Plain line.\n" * 50 + text
    assert found.remarks[0].lower() == f"read as {codec}, as detected"


def test_an_encoding_that_is_given_is_obeyed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "café".encode())
    assert read_file(path, "latin-1").text == "cafÃ©"
    assert read_file(path, "latin-1").remarks == ()
    with pytest.raises(DocumentError, match="is not utf-8: byte 0xe9 at position 3; leave the encoding out"):
        read_file(write(tmp_path, "b.txt", b"caf\xe9"), "utf-8")


def test_a_damaged_byte_does_not_change_the_encoding(tmp_path: Path) -> None:
    text = "naïve café, déjà vu, garçon, Zoë, voilà, Noël\n"
    found = read_file(write(tmp_path, "a.txt", (text * 2).encode() + b"\xff"))
    assert found.text == text * 2 + "\ufffd"
    assert found.remarks == ("1 byte outside UTF-8 replaced by U+FFFD",)


@pytest.mark.parametrize("before", [0, 70_000])
def test_nul_bytes_are_left_out_wherever_they_are(tmp_path: Path, before: int) -> None:
    found = read_file(write(tmp_path, "a.log", b"x" * before + b"ab\0\0cd"))
    assert found.text == "x" * before + "abcd"
    assert found.remarks == ("2 NUL bytes left out",)
    assert decode_text(b"a\0b", "a") == "ab"


def test_pieces_become_unicode_text() -> None:
    found = joined([("page 1", "a\ud835\udc00b\0"), ("page 2", " "), ("page 3", "lone \ud835 half"), ("", "more")])
    assert found.text == "a\U0001d400b\n\nlone \ufffd half\n\nmore"
    assert found.remarks == ("1 NUL byte left out", "1 half of a character replaced by U+FFFD")
    assert [found.part_at(offset) for offset in (0, 4, 5, len(found.text))] == ["page 1", "page 1", "page 3", "page 3"]
    assert joined([("", "x")]).part_at(0) == ""
    assert listed([2, 3, 4, 7, 9, 10, 11, 12], "page") == "pages 2, 3, 4, 7 and 9 to 12"


def test_what_pypdf_says_stays_with_it(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("pypdf").propagate = True
    with caplog.at_level(logging.DEBUG), pytest.raises(DocumentError):
        read_file(CASES / "crash.log").text and FORMATS[2].read("odd.pdf", b"%PDF-1.4 nothing here", None)
    assert caplog.records == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("markup", "limit", "message"),
    [
        ("<p>an ordinary line</p>" * 10_000, 1, ""),
        ("<div>" * 100_000 + "end", 5, "elements lie inside each other"),
        ("<!-- " * 100_000 + "end", 5, "no text"),
        ("<i></b>" * 30_000 + "end", 5, "elements lie inside each other"),
        ("<table><tr><td>" * 50_000, 5, "elements lie inside each other"),
        ("<p " + " ".join(f"a{i}=1" for i in range(50_000)) + ">end", 5, ""),
        ("<![foo" * 50_000 + "><p>end", 5, ""),
    ],
)
def test_pages_take_time_by_their_length(tmp_path: Path, markup: str, limit: float, message: str) -> None:
    path = write(tmp_path, "page.html", markup.encode())
    begin = time.process_time()
    if message:
        with pytest.raises(DocumentError, match=message):
            read_text(path)
    else:
        assert read_text(path).strip()
    assert time.process_time() - begin < limit


def archive(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return out.getvalue()


def docx(body: str, head: str = "") -> bytes:
    kinds = "http://schemas.openxmlformats.org"
    return archive(
        {
            "[Content_Types].xml": f'<Types xmlns="{kinds}/package/2006/content-types"><Default Extension="rels" '
            'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override '
            'PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
            'wordprocessingml.document.main+xml"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{kinds}/package/2006/relationships"><Relationship Id="r1" '
            f'Type="{kinds}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/>'
            "</Relationships>",
            "word/document.xml": f'{head}<w:document xmlns:w="{kinds}/wordprocessingml/2006/main"><w:body>{body}'
            "</w:body></w:document>",
        }
    )


def run(text: str) -> str:
    return f"<w:r><w:t>{text}</w:t></w:r>"


def test_word(tmp_path: Path) -> None:
    cells = "".join(
        f"<w:tr>{''.join(f'<w:tc><w:p>{run(cell)}</w:p></w:tc>' for cell in row)}</w:tr>"
        for row in (("a", "b"), ("c", "d"))
    )
    body = (
        f"<w:p>{run('un')}{run('broken')}<w:ins>{run(', new')}</w:ins><w:del><w:r>"
        "<w:delText>old</w:delText></w:r></w:del></w:p>"
        f"<w:sdt><w:sdtContent><w:p>{run('in a control')}</w:p></w:sdtContent></w:sdt><w:tbl>{cells}</w:tbl>"
    )
    text = "unbroken, new\nin a control\na\tb\nc\td"
    assert read_text(write(tmp_path, "a.docx", docx(body))) == text
    assert read_text(write(tmp_path, "no-suffix", docx(body))) == text


def test_powerpoint(tmp_path: Path) -> None:
    pptx = pytest.importorskip("pptx")
    made = pptx.Presentation()
    slide = made.slides.add_slide(made.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = "First", "one\ntwo"
    slide = made.slides.add_slide(made.slide_layouts[6])
    table = slide.shapes.add_table(1, 2, 0, 0, 100, 100).table
    table.cell(0, 0).text, table.cell(0, 1).text = "a", "b"
    slide.shapes.add_group_shape().shapes.add_textbox(0, 0, 9, 9).text_frame.text = "in a group"
    slide.notes_slide.notes_text_frame.text = "say it"
    made.save(tmp_path / "a.pptx")
    found = read_file(tmp_path / "a.pptx")
    assert found.text == "First\none\ntwo\n\na\tb\nin a group\nNotes: say it"
    assert found.parts == ((0, "slide 1"), (15, "slide 2"))


def test_spreadsheet(tmp_path: Path) -> None:
    xlsxwriter = pytest.importorskip("xlsxwriter")
    with xlsxwriter.Workbook(tmp_path / "a.xlsx") as book:
        pumps, _, more = (book.add_worksheet(name) for name in ("Pumps", "Empty", "More"))
        pumps.write_row(0, 0, ["name", "count"])
        pumps.write_row(1, 0, ["two\nlines", 3])
        pumps.write_formula(2, 1, "=B2*2", None, 6)
        more.write(2, 1, 0.5)
    found = read_file(tmp_path / "a.xlsx")
    assert found.text == "Pumps\nname\tcount\ntwo lines\t3\n\t6\n\nMore\n0.5"
    assert found.parts == ((0, 'sheet "Pumps"'), (33, 'sheet "More"'))


def odt(body: str, head: str = "") -> bytes:
    names = "urn:oasis:names:tc:opendocument:xmlns"
    content = (
        f'{head}<o:document-content xmlns:o="{names}:office:1.0" xmlns:text="{names}:text:1.0" '
        f'xmlns:table="{names}:table:1.0"><o:body><o:text>{body}</o:text></o:body></o:document-content>'
    )
    return archive({"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": content})


def test_open_document(tmp_path: Path) -> None:
    row = "<table:table-row>" + "<table:table-cell><text:p>x</text:p><text:p>y</text:p></table:table-cell>" * 2
    body = (
        "<text:tracked-changes><text:p>gone</text:p></text:tracked-changes><text:h>Head</text:h>"
        "<text:p>un<text:span>broken</text:span><text:s text:c='2'/>a*b<text:note><text:note-citation>1"
        "</text:note-citation><text:note-body><text:p>a note</text:p></text:note-body></text:note>.</text:p>"
        f"<table:table>{row}</table:table-row></table:table><text:list><text:list-item><text:p>one</text:p>"
        "</text:list-item></text:list>"
    )
    path = write(tmp_path, "a.odt", odt(body))
    assert read_text(path) == "Head\nunbroken a*b [a note].\nx y\tx y\none"


def epub(pages: dict[str, str], toc: str) -> bytes:
    items = "".join(
        f'<item id="i{n}" href="{name}" media-type="application/xhtml+xml"/>' for n, name in enumerate(pages)
    )
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(pages)))
    package = (
        f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}<item id="ncx" href="toc.ncx" '
        f'media-type="application/x-dtbncx+xml"/></manifest><spine>{spine}</spine></package>'
    )
    container = '<container><rootfiles><rootfile full-path="OEBPS/a.opf"/></rootfiles></container>'
    files = {"mimetype": "application/epub+zip", "META-INF/container.xml": container, "OEBPS/a.opf": package}
    files["OEBPS/toc.ncx"] = f"<ncx><navMap>{toc}</navMap></ncx>"
    return archive(files | {f"OEBPS/{name.replace('%20', ' ')}": page for name, page in pages.items()})


def test_a_book_has_chapters(tmp_path: Path) -> None:
    def point(title: str, target: str) -> str:
        return f'<navPoint><navLabel><text>{title}</text></navLabel><content src="{target}"/></navPoint>'

    head = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head><body>'
    pages = {
        "cover.xhtml": f"{head}<p>A book</p></body></html>",
        "ch%201.xhtml": f'{head}<a id="a"/><h2>One</h2><p>x&nbsp;<i/>y</p><h2 id="b">Two</h2><p>z</p></body></html>',
        "c2.xhtml": f"{head}<p>never closed<p>end</body></html>",
    }
    toc = point("One", "ch%201.xhtml#a") + point("Two", "ch%201.xhtml#b") + point("Three", "c2.xhtml")
    found = read_file(write(tmp_path, "a.epub", epub(pages, toc)))
    assert found.text == "A book\nOne\nx y\nTwo\nz\nnever closed\nend"
    places = [(found.text[start : start + 5], label) for start, label in found.parts]
    assert places == [("One\nx", 'chapter "One"'), ("Two\nz", 'chapter "Two"'), ("never", 'chapter "Three"')]


def test_rtf_mail_and_notebook(tmp_path: Path) -> None:
    rtf = rb"{\rtf1\ansi\ansicpg1252 caf\'e9 \u-10179?\u-8704?\par \trowd a\cell b\cell\row \\cell}"
    assert read_text(write(tmp_path, "a.rtf", rtf)) == "café \U0001f600\na\tb\n\\cell"
    mail = (
        "From: Ann <ann@example.org>\nSubject: =?utf-8?q?Caf=C3=A9?=\nMIME-Version: 1.0\n"
        'Content-Type: multipart/mixed; boundary="m"\n\n--m\nContent-Type: text/html; charset=iso-8859-1\n'
        "Content-Transfer-Encoding: quoted-printable\n\n<p>It is <b>caf=E9</b></p>\n--m\n"
        'Content-Type: application/pdf\nContent-Disposition: attachment; filename="a.pdf"\n\nx\n--m--\n'
    )
    found = read_file(write(tmp_path, "a.eml", mail.encode()))
    assert found.text == "From: Ann <ann@example.org>\nSubject: Café\n\nIt is café"
    assert found.remarks == ("1 attachment not read (a.pdf)",)
    outputs = [{"text": ["1\n"]}, {"data": {"text/plain": "42", "image/png": "iVBO"}}]
    cells = [{"source": ["# Title\n", "text"]}, {"source": "print(1)", "outputs": outputs}]
    found = read_file(write(tmp_path, "a.ipynb", json.dumps({"cells": cells}).encode()))
    assert found.text == "# Title\ntext\n\nprint(1)\n1\n42"
    assert found.parts == ((0, "cell 1"), (14, "cell 2"))


def test_archives_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_GROWTH", 2**20)
    for suffix in (".docx", ".pptx", ".xlsx", ".odt", ".epub"):
        with pytest.raises(DocumentError, match=r"has 3 MiB when unpacked; at most 1 MiB more than its own 0\.0 MiB"):
            read_text(write(tmp_path, f"a{suffix}", archive({"x": "0" * 3 * 2**20})))


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    names = [f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "boom"}">' for n in range(9)]
    head = f"<!DOCTYPE x [{''.join(names)}]>"
    begin = time.process_time()
    for name, data in (
        ("a.docx", docx(f"<w:p>{run('&e8;')}</w:p>", head)),
        ("a.odt", odt("<text:p>&e8;</text:p>", head)),
        ("a.epub", epub({"a.xhtml": f"{head}<html><body>&e8;</body></html>"}, "")),
    ):
        path = write(tmp_path, name, data)
        with contextlib.suppress(DocumentError):  # refused, or left out
            assert len(read_text(path)) < 100
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("name", ["a.docx", "a.pptx", "a.xlsx", "a.rtf"])
def test_a_missing_package_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mammoth", "pptx", "python_calamine", "striprtf", "striprtf.striprtf"):
        monkeypatch.setitem(sys.modules, module, None)
    data = b"{\\rtf1 x}" if name.endswith("rtf") else archive({"x": "y"})
    with pytest.raises(DocumentError, match=r"needs the extra documents: pip install 'focusllm\[documents\]'"):
        read_text(write(tmp_path, name, data))


def test_suffixes_follow_from_the_formats() -> None:
    assert {suffix for format in FORMATS for suffix in format.suffixes} == DOCUMENT_SUFFIXES
    assert {".docx", ".pptx", ".xlsx", ".odt", ".epub", ".rtf", ".eml", ".ipynb", ".pdf", ".html"} <= DOCUMENT_SUFFIXES
