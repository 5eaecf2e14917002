"""Text for training: read in a stream, tokenised once, kept as one memory-mapped array of token ids a source.

    folder, JSONL, Hugging Face dataset --> documents --> token ids, document after document --> tokens.npy
                                                          where each document ends            --> ends.npy
                                                          where its answer begins (or -1)     --> answers.npy

What was tokenised is known by its content (a dataset by its revision) and is not tokenised again, wherever it lies.
Documents are never joined: a sample lies in one of them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock

from focusllm.documents.readers import DOCUMENT_SUFFIXES, read_text
from focusllm.documents.text import encode_ids
from focusllm.errors import ConfigError, DocumentError, first_line, missing_package, shown
from focusllm.files import digest_of, open_text, remove_parts, whole_folder
from focusllm.json_text import parse_json
from focusllm.training.config import Source

Report = Callable[[str, int], None]
"""Called with (source, tokens so far) while a source is tokenised."""
SUFFIXES = {*DOCUMENT_SUFFIXES, ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts"} - {".json"}
JSON_LINES = {".jsonl", ".ndjson"}
FORMAT = 3
CUT = "\ufdd1"
"""Marks where a string that looks like a control token is cut. Unicode keeps it from being a character."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents.

    Args:
        tokens: [all tokens], memory-mapped. starts, ends: [D], where each document lies in them.
        answers: [D], index in the document of the first supervised token; -1: any token may be.
        digest: changes when what was tokenised does.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    answers: np.ndarray
    digest: str = ""

    def __len__(self) -> int:
        return len(self.ends)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the file of the tokens instead of the tokens."""
        file = getattr(self.tokens, "filename", None)
        return {**vars(self), "tokens": self.tokens if file is None else Path(file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tokens = state["tokens"]
        vars(self).update(state, tokens=np.load(tokens, mmap_mode="r") if isinstance(tokens, Path) else tokens)

    @property
    def lengths(self) -> np.ndarray:
        """[D], in tokens."""
        lengths: np.ndarray = self.ends - self.starts
        return lengths

    def document(self, index: int) -> np.ndarray:
        """Token ids of a document."""
        tokens: np.ndarray = self.tokens[self.starts[index] : self.ends[index]]
        return tokens

    def split(self, every: int = 50) -> tuple[Corpus, Corpus]:
        """What is trained on, and what is kept from it: one document of `every`, or the end of each of a few."""
        if len(self) < every and (self.answers < 0).all():
            cut = self.starts + self.lengths * (every - 1) // every
            return replace(self, ends=cut), replace(self, starts=cut)
        kept = np.arange(len(self)) % every == every - 1
        parts = [(self.starts[which], self.ends[which], self.answers[which]) for which in (~kept, kept)]
        trained, held_out = (Corpus(self.name, self.tokens, *part, self.digest) for part in parts)
        return trained, held_out


def load_corpus(source: Source, tokenizer: Any, folder: Path, report: Report = lambda *_: None) -> Corpus:
    """Tokenise a source into `folder`, unless that has been done.

    Raises:
        DocumentError: no text, or a file that cannot be read; ConfigError: a dataset without the named column.
    """
    rules = _rules(source, tokenizer)
    try:
        content = _content(source)
    except DocumentError as error:
        kept = folder.glob(f"{rules}-*/source.json") if source.path.startswith("hf:") else ()
        *_, last = [None, *sorted(kept, key=lambda path: path.stat().st_mtime)]
        if last is None:
            raise
        logger.warning("%s What was read of it before is used.", error)
        content = last.parent.name.removeprefix(f"{rules}-")
    target = folder / f"{rules}-{content}"
    if not (target / "source.json").exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # another process may be at it
                remove_parts(folder)
                if not (target / "source.json").exists():
                    with whole_folder(target) as part:
                        _tokenise(source, tokenizer, part, report, content)
                        if _is_here(source) and _content(source) != content:
                            raise DocumentError(f"{source.path} has changed while it was read; read it again.")
        except OSError as error:
            raise DocumentError(
                f"the tokens of {source.path} cannot be kept in {folder} ({error.strerror or error}); make room, or "
                f"set FOCUSLLM_CACHE to another folder."
            ) from error
    tokens = np.load(target / "tokens.npy", mmap_mode="r")
    ends, answers = np.load(target / "ends.npy"), np.load(target / "answers.npy")
    digest = parse_json((target / "source.json").read_bytes())["digest"]
    return Corpus(shown(source.path), tokens, np.concatenate([[0], ends[:-1]]), ends, answers, digest)


def _tokenise(source: Source, tokenizer: Any, folder: Path, report: Report, revision: str) -> None:
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    ends, answers, total = [], [], 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    raw = folder / "tokens.raw"
    with raw.open("wb") as file:
        for before, after in documents(source, tokenizer, revision):
            ids = encode_ids(tokenizer, before) if isinstance(before, str) else before
            supervised = [*encode_ids(tokenizer, after), *end] if after else []
            if not ids:
                continue
            np.asarray([*ids, *supervised], dtype=kind).tofile(file)
            total += len(ids) + len(supervised)
            ends.append(total)
            answers.append(len(ids) if supervised else -1)
            report(shown(source.path), total)
    if not total:
        raise DocumentError(f"{source.path} has no text; name a folder, a file or a dataset with some.")
    np.save(folder / "tokens.npy", np.memmap(raw, dtype=kind, mode="r"))
    raw.unlink()
    np.save(folder / "ends.npy", np.asarray(ends, dtype=np.int64))
    np.save(folder / "answers.npy", np.asarray(answers, dtype=np.int64))
    digest = "-".join(digest_of(folder / f"{name}.npy")[:16] for name in ("tokens", "ends", "answers"))
    about = {"path": source.path, "tokens": total, "documents": len(ends), "digest": digest}
    (folder / "source.json").write_text(json.dumps(about))


def check_source(source: Source) -> None:
    """Raises: DocumentError: a file or folder that is not there."""
    if not source.path.startswith("hf:") and not os.path.exists(source.path):
        raise DocumentError(f"there is no file or folder {source.path}; name one, or a dataset as hf:owner/name.")


def documents(source: Source, tokenizer: Any, revision: str | None = None) -> Iterator[tuple[str | list[int], str]]:
    """The documents of a source (of a dataset on the hub: in a revision) as (text or token ids, supervised answer or
    "").
    """
    if source.path.startswith("hf:"):
        for row in dataset_rows(source, revision):
            yield _row(row, source, tokenizer, f"the dataset {source.path[3:]}")
        return
    check_source(source)
    path = Path(source.path)
    for file in files(path):
        if file.suffix.lower() in JSON_LINES:
            for number, line in enumerate(_lines(file), 1):
                if line.strip():
                    yield _row(_parsed(line, file, number), source, tokenizer, f"{file}, line {number}")
        else:
            try:
                yield read_text(file), ""
            except DocumentError as error:
                if file == path:
                    raise
                logger.warning("left out: %s", error)  # one odd file among many


def _lines(file: Path) -> Iterator[str]:
    try:
        with open_text(file) as lines:
            yield from lines
    except OSError as error:
        raise DocumentError(f"{file} cannot be read ({error.strerror or error}); check its permissions.") from error
    except UnicodeError as error:
        raise DocumentError(f"{file} cannot be read ({error}); give JSON lines in UTF-8.") from error


def files(path: Path) -> list[Path]:
    """The files with text in a folder, in a fixed order, hidden ones left out; a file is itself."""
    if os.path.isfile(path):
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES | JSON_LINES]
    shown = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return [file for file in shown if file.is_file() and file.stat().st_size]


def _parsed(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DocumentError(f"{file}, line {number} is not JSON ({error}); one JSON object a line.") from error
    if not isinstance(row, dict):
        raise DocumentError(f"{file}, line {number} is not a JSON object; one JSON object a line.")
    return row


def _row(row: dict[str, Any], source: Source, tokenizer: Any, place: str) -> tuple[str | list[int], str]:
    """A row's text, or its prompt and answer."""
    if isinstance(row.get(source.column), str):
        return _whole(row[source.column]), ""
    if isinstance(row.get("messages"), list) and row["messages"]:
        return _conversation(row["messages"], tokenizer, place)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return _whole(row["prompt"]), _whole(row["completion"])
    if source.column in row and row[source.column] is None:
        return "", ""
    raise ConfigError(
        f"{place} has no text in a column {source.column!r}, nor messages, nor prompt and completion; it has "
        f"{', '.join(sorted(row)) or 'nothing'}. Name the column of the text."
    )


def _conversation(messages: list[Any], tokenizer: Any, place: str) -> tuple[list[int], str]:
    """The messages before the last as a prompt, the last one's content as the answer."""
    *asked, answer = messages
    content = answer.get("content") if isinstance(answer, dict) else None
    if not isinstance(content, str) or not asked or answer.get("role") != "assistant":
        raise DocumentError(f"{place} does not end with an assistant's message after another one; leave such rows out.")
    try:
        asked = _cut(asked, _looks_like_control(tokenizer))
        rendered: str = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        pieces = [tokenizer(piece, add_special_tokens=False, verbose=False) for piece in rendered.split(CUT)]
    except Exception as error:  # no template, or one that these messages do not suit
        raise DocumentError(f"{place} does not go through the model's chat template ({first_line(error)}).") from error
    return [token for piece in pieces for token in piece.input_ids], _whole(content)


def _looks_like_control(tokenizer: Any) -> re.Pattern[str]:
    """Finds the first character of whatever text the tokenizer would make one of its added tokens; white space is
    none of those that control anything.
    """
    added = sorted(token for token in tokenizer.get_added_vocab() if len(token) > 1 and token.strip())
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, added))}))(.)" if added else "(?!)()", re.DOTALL)


def _cut(content: Any, control: re.Pattern[str]) -> Any:
    """Messages as the chat template takes them, where each string that looks like a control token is cut behind its
    first character: tokenised apart, it stays text.
    """
    if isinstance(content, str):
        return control.sub(rf"\1{CUT}", _whole(content))
    if isinstance(content, list):
        return [_cut(part, control) for part in content]
    if isinstance(content, dict):
        return {name: _cut(part, control) for name, part in content.items()}
    return content


def _whole(text: str) -> str:
    """A text without halves of characters, which JSON may have where one was cut: in their place stands U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def dataset_rows(source: Source, revision: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a data set on the hub, or of a JSON Lines file in its repository (`hf:owner/name/folder/file.jsonl`,
    or `hf:owner/name/files.zip/folder/file.jsonl`: data sets that come with a program of their own are loaded no
    longer), read in a stream. revision: a commit of the repository; None: the newest one.

    Raises:
        ConfigError: the package datasets is not installed; DocumentError: the data set cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_package("Hugging Face datasets need", "datasets", "train") from error
    name = source.path[3:]
    selection: dict[str, Any] = {"path": name, "name": source.subset, "split": source.split}
    if revision and not _is_here(source):
        selection["revision"] = revision
    if ".jsonl" in name:
        at = f"@{revision}" if revision else ""
        archive, inside, file = name.replace(_repository(name), _repository(name) + at, 1).partition(".zip/")
        place = f"zip://{file}::hf://datasets/{archive}.zip" if inside else f"hf://datasets/{archive}"
        selection = {"path": "json", "data_files": place, "split": "train"}
    try:
        yield from load_dataset(**selection, streaming=True)
    except Exception as error:  # whatever the hub, its client, a proxy or a malformed file objects to
        raise DocumentError(f"the dataset {name} cannot be read ({first_line(error)}).") from error


def _is_here(source: Source) -> bool:
    """Whether a source is a file or a folder, which `hf:` may name too."""
    name = source.path.removeprefix("hf:")
    return os.path.exists(name) if name == source.path else os.path.isdir(name) and ".jsonl" not in name


def _repository(name: str) -> str:
    """The repository that a dataset, or a file in it, is of."""
    return "/".join(name.split("/")[:2])


def _rules(source: Source, tokenizer: Any) -> str:
    """Changes when the way from content to tokens does; for a dataset, also when another part of it is taken."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    known = sorted(tokenizer.get_vocab().items()) if rules is None else rules.to_str()
    part = (source.path, source.split, source.subset) if source.path.startswith("hf:") else ()
    said = repr((FORMAT, source.column, part, known, tokenizer.chat_template, tokenizer.eos_token_id))
    return str(xxhash.xxh3_64_hexdigest(said.encode()))


def _content(source: Source) -> str:
    """Changes when the content of a source does: of files their names in it and their bytes, of a dataset on the hub
    its revision.

    Raises:
        DocumentError: there is no such source, or the hub does not give it.
    """
    name = source.path.removeprefix("hf:")
    if source.path.startswith("hf:") and not _is_here(source):
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(_repository(name)).sha)
        except Exception as error:  # whatever the hub, its client or a proxy objects to
            raise DocumentError(f"the dataset {name} cannot be read ({first_line(error)}).") from error
    check_source(source)
    path, digest = Path(name), xxhash.xxh3_128()
    for file in files(path) if name == source.path else sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{(file.name if file == path else str(file.relative_to(path)))!r} {_digest(file)} ".encode())
    return digest.hexdigest()


def _digest(file: Path) -> str:
    try:
        return digest_of(file)
    except OSError as error:  # it is left out, or refused, when it is read
        return str(error.errno)
