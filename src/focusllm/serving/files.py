"""Files that clients upload: kept as they came, read in the background into the library, and asked by who owns them.

    upload -> uploads/ID.suffix, catalogue.files.sqlite -> library document ID -> a question's documents

A file is acknowledged when its bytes and its row are on the disk. What is missing then is made up for at the next
start: a file that was to be read is read, a document or upload without a row is removed.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from focusllm.documents.document import Document
from focusllm.documents.readers import read_data
from focusllm.documents.sources import Source, of_extracted, open_source
from focusllm.errors import DocumentError, FocusError, LibraryError, shown
from focusllm.files import PART, to_disk
from focusllm.library.library import Library
from focusllm.memory.chunks import Progress
from focusllm.serving.api_errors import ApiError
from focusllm.serving.file_catalogue import FileCatalogue, Member, StoredFile, VectorStore, new_id
from focusllm.serving.refusals import ClosedError

PURPOSES = ("assistants", "user_data")
LONGEST_NAME = 255
COPIED_AT_ONCE = 1 << 20
STRAY_SECONDS = 3600.0
"""So long after it was last written to, an upload without a row is one that was cut short, and no other server's."""
LOOK_SECONDS = 30.0
"""Between two looks for files that another process wants to be read."""
ID = re.compile(r"file-[0-9a-f]{24}")
log = logging.getLogger(__name__)


class Files:
    """Uploaded files of a server.

    Args:
        library: that they are read into; its `run` is where the model is.
        most_tokens: of a file that is read; None: no limit.
    """

    def __init__(self, library: Library, most_tokens: int | None = None):
        self.library, self.most_tokens = library, most_tokens
        self.catalogue = FileCatalogue(library.folder / "catalogue.files.sqlite")
        self.folder = library.folder / "uploads"
        self.folder.mkdir(exist_ok=True)
        self._progress: dict[str, tuple[int, int]] = {}
        self._changed = threading.Condition()
        self._is_closing = self._is_wanted = False  # wanted: something has changed since the last look
        self._thread: threading.Thread | None = None

    # For any thread

    def start(self) -> None:
        """Make up for what was cut short, and read in the background from now on."""
        paths, entries = list(self.folder.iterdir()), self.library.entries()
        known = {file.id for file in self.catalogue.files()}  # the last of the three: a row is before its document
        for path in paths:
            if path.stem not in known and _is_stray(path):
                path.unlink(missing_ok=True)
        gone = [entry.name for entry in entries if ID.fullmatch(entry.name) and entry.name not in known]
        self.library.catalogue.remove(gone)
        self._thread = threading.Thread(target=self._read_all, name="focusllm-files", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read no more; what is left is read after the next start. The worker must end before, or soon."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def upload(self, owner: str, filename: str, purpose: str, content: BinaryIO) -> StoredFile:
        """Keep a file.

        Raises:
            ApiError: it is empty, or is for something else than to be asked. LibraryError: the disk is full.
        """
        if purpose not in PURPOSES:
            raise ApiError(
                400, f"The purpose {purpose!r} is not supported; use 'assistants' or 'user_data'.", "purpose"
            )
        name, file_id = shown_name(filename), new_id("file-")
        path = self.folder / f"{file_id}{_suffix(name)}"
        part = self.folder / f"{PART}{file_id}"
        try:
            with part.open("xb") as kept:
                while piece := content.read(COPIED_AT_ONCE):
                    kept.write(piece)
                size = kept.tell()
                kept.flush()
                os.fsync(kept.fileno())
            if not size:
                raise ApiError(400, f"The file {name} is empty; upload one with text.", "file")
            part.replace(path)
            to_disk(self.folder)
            file = StoredFile(file_id, owner, name, size, int(time.time()), purpose)
            self.catalogue.add_file(file)
        except LibraryError:
            path.unlink(missing_ok=True)
            raise
        except OSError as error:
            raise LibraryError(f"the file cannot be kept ({error.strerror}); remove some, or upload later.") from error
        finally:
            part.unlink(missing_ok=True)
        return file

    def file(self, file_id: str, owner: str) -> StoredFile:
        """A file.

        Raises:
            ApiError: 404, where there is none for this owner.
        """
        found = self.catalogue.file(file_id, owner)
        if found is None:
            raise ApiError(404, f"There is no file {file_id!r}.", "file_id", "file_not_found")
        return found

    def path(self, file: StoredFile) -> Path:
        """Where its bytes are."""
        return self.folder / f"{file.id}{_suffix(file.filename)}"

    def remove(self, file: StoredFile) -> None:
        """Forget a file, its document, and in the end what only that needed."""
        self.catalogue.remove_file(file.id)
        self._forget(file)
        self._look()

    def store(self, store_id: str, owner: str) -> VectorStore:
        """A vector store.

        Raises:
            ApiError: 404, where there is none for this owner.
        """
        found = self.catalogue.store(store_id, owner)
        if found is None:
            raise ApiError(404, f"There is no vector store {store_id!r}.", "vector_store_id", "vector_store_not_found")
        return found

    def put_into(self, store: VectorStore, files: Sequence[StoredFile], attributes: Mapping[str, object]) -> None:
        """Put files into a store, and have them read.

        Raises:
            ApiError: 404, one of them was removed meanwhile.
        """
        try:
            self.catalogue.put_into(store.id, [file.id for file in files], attributes)
        except LibraryError:
            self.store(store.id, store.owner)
            for file in files:
                self.file(file.id, file.owner)
            raise
        self._look()

    def member(self, store: VectorStore, file_id: str) -> Member:
        """A file of a store.

        Raises:
            ApiError: 404, where it is not in there.
        """
        found = next((one for one in self.catalogue.members(store.id) if one.file.id == file_id), None)
        if found is None:
            raise ApiError(404, f"There is no file {file_id!r} in {store.id}.", "file_id", "file_not_found")
        return found

    def progress(self, file: StoredFile) -> tuple[int, int] | None:
        """Tokens that are read, and all of them, while it is read."""
        return self._progress.get(file.id)

    def documents(
        self, owner: str, file_ids: Sequence[str] = (), vector_store_ids: Sequence[str] = ()
    ) -> list[Document]:
        """Files and those of vector stores, to be asked, each once; what is not read yet is read for that.

        Raises:
            ApiError: 404 for what is not there; 400 for a file that cannot be read. ClosedError: the server ends.
        """
        wanted = [self.file(file_id, owner) for file_id in file_ids]
        for store_id in vector_store_ids:
            members = self.catalogue.members(self.store(store_id, owner).id)
            wanted += [member.file for member in members if member.file.status != "failed"]
        found = []
        for file in {file.id: file for file in wanted}.values():
            try:
                found.append(self._read(file))
            except (DocumentError, LibraryError) as error:
                raise ApiError(
                    400, f"The file {file.id} cannot be asked: {self._said(file, error)}", "file_id"
                ) from error
        return found

    def find(self, owner: str, document: str) -> StoredFile | None:
        """An owner's file that a document of the library is; None: it is none."""
        return self.catalogue.file(document, owner) if ID.fullmatch(document) else None

    # In the background

    def _look(self) -> None:
        with self._changed:
            self._is_wanted = True
            self._changed.notify()

    def _read_all(self) -> None:
        """Read what is to be read, of the owners in turns; collect what nobody needs when there is nothing to read."""
        had, is_collected = Counter[str](), False
        while not self._is_closing:
            with self._changed:
                is_collected = is_collected and not self._is_wanted
                self._is_wanted = False  # what changes from here on is looked at again
            try:
                left = [file for file in self.catalogue.files() if file.status == "in_progress"]
                if left:
                    file = min(left, key=lambda file: had[file.owner])
                    had[file.owner] += 1
                    self._read_to_the_end(file)
                    continue
                if not is_collected:
                    self.library.gc()
                    is_collected = True
            except ClosedError:
                return
            except FocusError as error:  # of the catalogue or the disk; the next look may do
                log.warning("%s", error)
            except Exception as error:
                log.error("the look for files that are to be read failed", exc_info=error)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._is_wanted, LOOK_SECONDS)

    def _read_to_the_end(self, file: StoredFile) -> None:
        try:
            self._read(file)
        except ClosedError:
            raise
        except ApiError:  # it was removed meanwhile
            return
        except DocumentError as error:
            self.catalogue.set_status(file.id, "failed", "unsupported_file", self._said(file, error))
        except FocusError as error:
            self.catalogue.set_status(file.id, "failed", "server_error", self._said(file, error))
        except Exception as error:
            log.error("a file could not be read", exc_info=error)
            self.catalogue.set_status(file.id, "failed", "server_error", "The server failed at it; its log says why.")

    def _read(self, file: StoredFile) -> Document:
        """The document of a file; what is not there of it is read."""

        def report(done: int, total: int) -> None:
            self._progress[file.id] = done, total
            self._check_there(file)

        def checked(done: int, total: int) -> None:
            if self.most_tokens is not None and total > self.most_tokens:
                self.library.remove(file.id)
                most = f"{self.most_tokens:,} that a prompt may have here"
                raise DocumentError(f"{file.filename} has {total:,} tokens, more than the {most}; give a shorter one.")
            report(done, total)

        try:
            if file.status != "completed":
                self._add(file, checked)
            try:
                document = self.library.document(file.id, progress=report)
            except LibraryError:  # somebody has removed it there, or it is damaged; its bytes are kept here
                self.library.catalogue.remove([file.id])
                self._add(file, checked)
                document = self.library.document(file.id, progress=report)
        except (DocumentError, LibraryError):
            self._check_there(file)
            raise
        finally:
            self._progress.pop(file.id, None)
        self._check_there(file)
        return document

    def _add(self, file: StoredFile, progress: Progress) -> None:
        source = open_source(self.path(file))
        files = tuple(replace(one, name=file.filename, path=None) for one in source.files)
        self.library.add(replace(source, name=file.id, files=files), progress=progress)
        self.catalogue.set_status(file.id, "completed")

    def _check_there(self, file: StoredFile) -> None:
        """Nothing stays of a file that was removed while it was read."""
        if self.catalogue.file(file.id) is None:
            self._forget(file)
            raise ApiError(404, f"There is no file {file.id!r} any more.", "file_id", "file_not_found")

    def _forget(self, file: StoredFile) -> None:
        self.path(file).unlink(missing_ok=True)
        try:
            self.library.remove(file.id)
        except LibraryError:  # it was never read, or another thread has just removed it
            if self.library.catalogue.has(file.id):
                raise

    def _said(self, file: StoredFile, error: Exception) -> str:
        """An error without the places of this machine."""
        path, said = self.path(file), str(error)
        for place, name in (
            (str(path), file.filename),
            (path.name, file.filename),
            (str(self.library.folder), "the library"),
        ):
            said = said.replace(place, name)
        return said


def shown_name(filename: str) -> str:
    """A file's name as it is kept and shown: no folders, one line, not too long."""
    name = shown(PureWindowsPath(PurePosixPath(filename).name).name).strip()
    if len(name) > LONGEST_NAME:
        suffix = PurePosixPath(name).suffix[:16]
        name = name[: LONGEST_NAME - len(suffix)] + suffix
    return name.encode("utf-8", "backslashreplace").decode() or "file"


def read_bytes(content: bytes, filename: str) -> Source:
    """A file that comes with the question, and is not kept.

    Raises:
        DocumentError: nothing in it can be read.
    """
    name = shown_name(filename)
    return of_extracted(read_data(name, content), name)


def _suffix(name: str) -> str:
    """What tells the format; nothing that means anything in a path."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,12}", suffix) else ""


def _is_stray(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > STRAY_SECONDS
    except FileNotFoundError:  # its server has finished with it
        return False
