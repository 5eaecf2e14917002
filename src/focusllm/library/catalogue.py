"""What is in a library: documents with their texts and chunks, and sets of them, in a file of SQLite.

A connection is open for one transaction and no longer, so that threads and processes share nothing but the file. Of a
document all is written at once: its text, its chunks' places, tokens and keys, with one sum over it, so that it is
there as a whole or not at all, and a damaged one is known. No torch.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock

from focusllm.documents.sources import File
from focusllm.errors import LibraryError, first_line
from focusllm.json_text import parse_json
from focusllm.options import unknown

CATALOGUE_NAME = "catalogue.sqlite"
FORMAT = 1
SECONDS_TO_WAIT = 30.0
"""For another process that writes."""
TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE documents (name TEXT PRIMARY KEY, entry TEXT NOT NULL, content BLOB NOT NULL, keys TEXT NOT NULL);
CREATE TABLE sets (name TEXT NOT NULL, document TEXT NOT NULL REFERENCES documents ON DELETE CASCADE,
                   PRIMARY KEY (name, document));
CREATE TABLE folders (name TEXT PRIMARY KEY, folder TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Entry:
    """What is known of a document without looking into it."""

    name: str
    num_characters: int
    num_tokens: int
    num_chunks: int
    changed: float
    """When, in seconds since 1970."""
    version: str
    """The sum over text, files and chunks: changes when any of them does."""
    source: str | None = None
    """The file or folder that it was read of."""
    digest: str | None = None
    """Of that file's bytes, if its text is brought up to date by them."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class KeptChunk:
    """A chunk of a document: its characters, half-open, its tokens, and the key of what was read."""

    start: int
    end: int
    token_ids: list[int]
    key: str


@dataclass(frozen=True)
class Content:
    """The text of a document and what became of it."""

    text: str
    files: tuple[File, ...]
    chunks: list[KeptChunk]

    @property
    def num_tokens(self) -> int:
        """Of all chunks."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    def to_bytes(self) -> bytes:
        """As it is kept."""
        chunks = [(chunk.start, chunk.end, chunk.token_ids, chunk.key) for chunk in self.chunks]
        files = [asdict(file) for file in self.files]
        return json.dumps({"text": self.text, "files": files, "chunks": chunks}).encode()

    @classmethod
    def from_bytes(cls, kept: bytes) -> Content:
        """The way back."""
        found = json.loads(kept)
        files = (File(**{**file, "parts": tuple(map(tuple, file["parts"]))}) for file in found["files"])
        return cls(found["text"], tuple(files), [KeptChunk(*chunk) for chunk in found["chunks"]])


class Catalogue:
    """The catalogue in a folder.

    Args:
        folder: of the library. read_only: nothing is written, not even by SQLite itself.

    Raises (every method):
        LibraryError: there is none, it is damaged or of a newer format, cannot be written to, or is locked for longer
            than `SECONDS_TO_WAIT`.
    """

    def __init__(self, folder: Path, read_only: bool = False):
        self.path, self.read_only = folder / CATALOGUE_NAME, read_only

    def create(self, about: dict[str, Any]) -> None:
        """Make a new one, unless there is one."""
        with self._sentences(), FileLock(self.path.with_suffix(".lock"), timeout=SECONDS_TO_WAIT):
            if self.path.exists():
                return
            part = self.path.with_suffix(".new")  # an unfinished one has no name that anybody opens
            for path in (part, self.path):  # SQLite would take an earlier one's log for its own
                for end in ("", "-wal", "-shm"):
                    path.with_name(path.name + end).unlink(missing_ok=True)
            with closing(sqlite3.connect(part)) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
                rows = [(name, json.dumps(value)) for name, value in about.items()]
                database.executemany("INSERT INTO about VALUES (?, ?)", rows)
                database.commit()
            part.replace(self.path)

    def about(self) -> dict[str, Any]:
        """What is known of the library itself."""
        with self._transaction() as database:
            return {name: parse_json(value) for name, value in database.execute("SELECT name, value FROM about")}

    def set_about(self, name: str, value: Any) -> None:
        """Change it."""
        with self._transaction(writes=True) as database:
            database.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, json.dumps(value)))

    def put(
        self,
        name: str,
        content: Content,
        source: str | None = None,
        digest: str | None = None,
        put_into: str | None = None,
    ) -> Entry:
        """Add a document, or put another text in the place of its own.

        Args:
            put_into: a set that it belongs to from now on.

        Raises:
            LibraryError: a set has that name.
        """
        kept = content.to_bytes()
        version = blake2b(kept, digest_size=16).hexdigest()
        counts = (len(content.text), content.num_tokens, len(content.chunks))
        entry = Entry(name, *counts, time.time(), version, source, digest)
        keys = " ".join(chunk.key for chunk in content.chunks)
        with self._transaction(writes=True) as database:
            _check_free(database, "sets", name, "a set of documents")
            database.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET entry = excluded.entry, "
                "content = excluded.content, keys = excluded.keys",
                (name, json.dumps(entry.to_dict()), kept, keys),
            )
            if put_into is not None:
                _put_into(database, put_into, [name])
        return entry

    def entries(self) -> list[Entry]:
        """All documents, by name."""
        with self._transaction() as database:
            rows = database.execute("SELECT name, entry FROM documents ORDER BY name").fetchall()
        return [_entry(name, kept) for name, kept in rows]

    def entry(self, name: str) -> Entry:
        """A document.

        Raises:
            LibraryError: there is none of that name; says what is near.
        """
        return _entry(name, self._document(name)[0])

    def names(self, given: str | Sequence[str] | None = None) -> list[str]:
        """The documents that are meant by names of documents and sets; None: all.

        Raises:
            LibraryError: there is nothing of such a name, or nothing at all.
        """
        if given is None:
            found = [entry.name for entry in self.entries()]
            if not found:
                raise LibraryError(f"{self.path.parent} has no documents; add one.")
            return found
        sets = self.sets()
        wanted = [given] if isinstance(given, str) else given
        found = [name for one in wanted for name in sets.get(one) or [self.entry(one).name]]
        return list(dict.fromkeys(found))

    def content(self, name: str) -> tuple[Entry, Content]:
        """A document with its text and chunks.

        Raises:
            LibraryError: there is none of that name, or what is kept of it is damaged.
        """
        about, kept, keys = self._document(name)
        entry = _entry(name, about)
        if blake2b(kept, digest_size=16).hexdigest() == entry.version:
            content = Content.from_bytes(kept)
            if keys == " ".join(chunk.key for chunk in content.chunks):
                return entry, content
        again = f"update it from {entry.source}" if entry.source else "remove it and add it again"
        raise LibraryError(f"what the library keeps of {name} is damaged; {again}.")

    def has(self, name: str) -> bool:
        """Whether there is a document of that name."""
        with self._transaction() as database:
            return database.execute("SELECT 1 FROM documents WHERE name = ?", (name,)).fetchone() is not None

    def _document(self, name: str) -> tuple[str, bytes, str]:
        with self._transaction() as database:
            query = "SELECT entry, content, keys FROM documents WHERE name = ?"
            row: tuple[str, bytes, str] | None = database.execute(query, (name,)).fetchone()
        if row is None:
            known = [*(entry.name for entry in self.entries()), *self.sets()]
            if not known:
                raise LibraryError(f"there is no document {name!r}, for {self.path.parent} is empty; add it.")
            raise LibraryError(unknown("document", name, known))
        return row

    def remove(self, names: Sequence[str]) -> None:
        """Forget documents; their chunks stay until nobody needs them and they are collected."""
        with self._transaction(writes=True) as database:
            database.executemany("DELETE FROM documents WHERE name = ?", [(name,) for name in names])
            database.execute("DELETE FROM folders WHERE name NOT IN (SELECT name FROM sets)")

    def keys(self) -> set[str]:
        """The keys of all chunks of all documents."""
        with self._transaction() as database:
            return {key for (keys,) in database.execute("SELECT keys FROM documents") for key in keys.split()}

    def sets(self) -> dict[str, list[str]]:
        """All sets with their documents, both by name."""
        found: dict[str, list[str]] = {}
        with self._transaction() as database:
            for name, document in database.execute("SELECT name, document FROM sets ORDER BY name, document"):
                found.setdefault(name, []).append(document)
        return found

    def put_into(self, name: str, documents: Sequence[str]) -> None:
        """Put documents that are there into a set.

        Raises:
            LibraryError: a document has that name.
        """
        with self._transaction(writes=True) as database:
            _put_into(database, name, documents)

    def take_out(self, name: str, documents: Sequence[str]) -> None:
        """Take documents out of a set; they stay in the library. A set without documents is gone."""
        with self._transaction(writes=True) as database:
            rows = [(name, document) for document in documents]
            database.executemany("DELETE FROM sets WHERE name = ? AND document = ?", rows)
            database.execute("DELETE FROM folders WHERE name NOT IN (SELECT name FROM sets)")

    def folder_of(self, name: str) -> str | None:
        """The folder that a set is brought up to date from; None: it is of no folder."""
        with self._transaction() as database:
            row = database.execute("SELECT folder FROM folders WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def set_folder(self, name: str, folder: str) -> None:
        """Say which folder a set is of."""
        with self._transaction(writes=True) as database:
            database.execute("INSERT OR REPLACE INTO folders VALUES (?, ?)", (name, folder))

    def is_sound(self) -> bool:
        """Whether SQLite finds nothing wrong in its file."""
        with self._transaction() as database:
            return bool(database.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))

    @contextmanager
    def _transaction(self, writes: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction; written is all that was said, or nothing."""
        with self._sentences(), self._connected() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                raise LibraryError(
                    f"{self.path.parent} has format {version} and this version of FocusLLM knows {FORMAT}; use a newer "
                    f"FocusLLM, or another folder."
                )
            database.execute("PRAGMA foreign_keys = ON")
            database.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            yield database
            database.commit()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise LibraryError(f"there is no library in {self.path.parent}; add a document to make one.")
        place = self.path.absolute().as_uri()
        try:  # what others have written a moment ago lies beside the file
            database = _opened(f"{place}?mode={'ro' if self.read_only else 'rw'}")
        except sqlite3.OperationalError:
            if not self.read_only:
                raise
        else:
            with closing(database):
                yield database
            return
        # Nobody writes: nothing lies there, and on this mount nothing can be put there, a lock neither.
        before = self.path.stat()
        with closing(_opened(f"{place}?immutable=1")) as database:
            yield database
        after = self.path.stat()
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            raise LibraryError(f"{self.path.parent} was changed while it was read; try again.")

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        folder = self.path.parent
        try:
            yield
        except sqlite3.OperationalError as error:
            reason = first_line(error)
            if "locked" in reason:
                remedy = f"another process has been writing for {SECONDS_TO_WAIT:.0f} seconds; try again"
            elif "full" in reason:
                remedy = "make room, or use another folder"
            else:
                remedy = "check its permissions, or use another folder"
            raise LibraryError(f"the catalogue of {folder} cannot be used ({reason}); {remedy}.") from error
        except sqlite3.IntegrityError as error:
            raise LibraryError("a document was removed meanwhile by another process; try again.") from error
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise LibraryError(
                f"the catalogue of {folder} is damaged ({first_line(error)}); move {CATALOGUE_NAME} away and add the "
                f"documents again: chunks that are still there are not read again."
            ) from error
        except (OSError, TimeoutError) as error:
            raise LibraryError(f"{folder} cannot be used ({error}); check its permissions, or use another.") from error


def _entry(name: str, kept: str) -> Entry:
    """An entry as it was written; of a damaged one its name, and a version that fits no content."""
    try:
        return Entry(**parse_json(kept))
    except (ValueError, TypeError):
        return Entry(name, 0, 0, 0, 0.0, "")


def _opened(uri: str) -> sqlite3.Connection:
    database = sqlite3.connect(uri, uri=True, timeout=SECONDS_TO_WAIT, isolation_level=None)
    try:
        database.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.Error:
        database.close()
        raise
    return database


def _put_into(database: sqlite3.Connection, name: str, documents: Sequence[str]) -> None:
    _check_free(database, "documents", name, "a document")
    rows = [(name, document) for document in documents]
    database.executemany("INSERT OR IGNORE INTO sets VALUES (?, ?)", rows)


def _check_free(database: sqlite3.Connection, table: str, name: str, what: str) -> None:
    if database.execute(f"SELECT 1 FROM {table} WHERE name = ?", (name,)).fetchone():
        raise LibraryError(f"{name} is {what} already; choose another name.")


def is_library(folder: Path) -> bool:
    """Whether a folder is a library."""
    return (folder / CATALOGUE_NAME).is_file()


def check_folder(folder: Path) -> None:
    """Check that a folder is a library or can become one.

    Raises:
        LibraryError: other files are in it, or it is a file.
    """
    if is_library(folder) or not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise LibraryError(f"{folder} is a file, not the folder of a library; name another.")
    try:
        others = [path.name for path in folder.iterdir() if not path.name.startswith("catalogue.")]
    except OSError as error:
        raise LibraryError(f"{folder} cannot be read ({error.strerror}); check its permissions.") from error
    if others and others != ["chunks"]:
        raise LibraryError(f"{folder} is not a library and has other files in it ({others[0]}); name an empty folder.")
