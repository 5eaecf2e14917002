"""Uploaded files and vector stores, and whose they are, in a file of SQLite. No torch.

A connection is open for one transaction and no longer. What a method has written is on the disk when it returns.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from focusllm.errors import LibraryError, first_line

SECONDS_TO_WAIT = 30.0
"""For another thread or process that writes."""
TABLES = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, filename TEXT NOT NULL, bytes INTEGER NOT NULL, created INTEGER NOT NULL,
    purpose TEXT NOT NULL, status TEXT NOT NULL, code TEXT, message TEXT);
CREATE TABLE IF NOT EXISTS stores (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, created INTEGER NOT NULL, metadata TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS members (
    store TEXT NOT NULL REFERENCES stores ON DELETE CASCADE, file TEXT NOT NULL REFERENCES files ON DELETE CASCADE,
    created INTEGER NOT NULL, attributes TEXT NOT NULL, PRIMARY KEY (store, file));
"""
Status = Literal["uploaded", "in_progress", "completed", "failed"]
"""Of reading a file: not asked for yet, asked for, done, given up."""


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file."""

    id: str
    owner: str
    filename: str
    bytes: int
    created: int
    """Seconds since 1970, of all that is kept here."""
    purpose: str
    status: Status = "uploaded"
    code: str | None = None
    """Why it was given up, for programs; `message` for people."""
    message: str | None = None


@dataclass(frozen=True)
class VectorStore:
    """Files that are asked together."""

    id: str
    owner: str
    name: str
    created: int
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A file in a vector store."""

    file: StoredFile
    store: str
    created: int
    attributes: dict[str, Any]


def new_id(prefix: str) -> str:
    """One that nobody guesses."""
    return f"{prefix}{secrets.token_hex(12)}"


class FileCatalogue:
    """The catalogue in a folder, for any number of threads and processes.

    Args:
        path: its file; made when it is not there.

    Raises (every method):
        LibraryError: the disk is full, another one writes for longer than `SECONDS_TO_WAIT`, or what is named was
            removed.
    """

    def __init__(self, path: Path):
        self.path = path
        with closing(sqlite3.connect(path, timeout=SECONDS_TO_WAIT)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(TABLES)

    # Files

    def add_file(self, file: StoredFile) -> None:
        """A file whose bytes are kept already."""
        values = (file.id, file.owner, file.filename, file.bytes, file.created, file.purpose, file.status)
        with self._transaction() as database:
            database.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL)", values)

    def file(self, file_id: str, owner: str | None = None) -> StoredFile | None:
        """A file; None: there is none, or it is another owner's.

        Args:
            owner: None: whoever's.
        """
        with self._transaction() as database:
            row = database.execute("SELECT * FROM files WHERE id = ?", (file_id,)).fetchone()
        return StoredFile(*row) if row and owner in (None, row[1]) else None

    def files(self, owner: str | None = None) -> list[StoredFile]:
        """All files of an owner, or of all; the newest last."""
        with self._transaction() as database:
            rows = database.execute("SELECT * FROM files ORDER BY created, rowid").fetchall()
        return [StoredFile(*row) for row in rows if owner in (None, row[1])]

    def set_status(self, file_id: str, status: Status, code: str | None = None, message: str | None = None) -> None:
        """How far reading it is."""
        with self._transaction() as database:
            query = "UPDATE files SET status = ?, code = ?, message = ? WHERE id = ?"
            database.execute(query, (status, code, message, file_id))

    def remove_file(self, file_id: str) -> None:
        """Forget a file, in all stores."""
        with self._transaction() as database:
            database.execute("DELETE FROM files WHERE id = ?", (file_id,))

    # Vector stores

    def add_store(self, store: VectorStore) -> None:
        """A new one."""
        values = (store.id, store.owner, store.name, store.created, json.dumps(store.metadata))
        with self._transaction() as database:
            database.execute("INSERT INTO stores VALUES (?, ?, ?, ?, ?)", values)

    def store(self, store_id: str, owner: str) -> VectorStore | None:
        """A vector store; None: there is none, or it is another owner's."""
        return next((store for store in self.stores(owner) if store.id == store_id), None)

    def stores(self, owner: str) -> list[VectorStore]:
        """All of an owner; the newest last."""
        with self._transaction() as database:
            rows = database.execute("SELECT * FROM stores WHERE owner = ? ORDER BY created, rowid", (owner,)).fetchall()
        return [VectorStore(row[0], row[1], row[2], row[3], json.loads(row[4])) for row in rows]

    def change_store(self, store_id: str, name: str, metadata: dict[str, Any]) -> None:
        """Another name, other notes."""
        with self._transaction() as database:
            query = "UPDATE stores SET name = ?, metadata = ? WHERE id = ?"
            database.execute(query, (name, json.dumps(metadata), store_id))

    def remove_store(self, store_id: str) -> None:
        """Forget a store; its files stay."""
        with self._transaction() as database:
            database.execute("DELETE FROM stores WHERE id = ?", (store_id,))

    def put_into(self, store_id: str, file_ids: Sequence[str], attributes: Mapping[str, Any]) -> None:
        """Put files into a store, and ask for those to be read that were not, or were given up."""
        with self._transaction() as database:
            rows = [(store_id, file_id, int(time.time()), json.dumps(dict(attributes))) for file_id in file_ids]
            database.executemany("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)", rows)
            query = (
                "UPDATE files SET status = 'in_progress', code = NULL, message = NULL "
                "WHERE id = ? AND status IN ('uploaded', 'failed')"
            )
            database.executemany(query, [(file_id,) for file_id in file_ids])

    def take_out(self, store_id: str, file_id: str) -> None:
        """Take a file out of a store; it stays."""
        with self._transaction() as database:
            database.execute("DELETE FROM members WHERE store = ? AND file = ?", (store_id, file_id))

    def members(self, store_id: str) -> list[Member]:
        """The files of a store; the newest last."""
        query = (
            "SELECT files.*, members.store, members.created, members.attributes FROM members "
            "JOIN files ON files.id = members.file WHERE members.store = ? ORDER BY members.created, members.rowid"
        )
        with self._transaction() as database:
            rows = database.execute(query, (store_id,)).fetchall()
        return [Member(StoredFile(*row[:9]), row[9], row[10], json.loads(row[11])) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT)) as database:
                database.execute("PRAGMA foreign_keys = ON")
                database.execute("PRAGMA synchronous = FULL")
                yield database
                database.commit()
        except sqlite3.IntegrityError as error:
            raise LibraryError("a file or a store was removed meanwhile; try again.") from error
        except sqlite3.DatabaseError as error:
            reason = first_line(error)
            raise LibraryError(f"{self.path} cannot be used ({reason}); make room, or try again.") from error
