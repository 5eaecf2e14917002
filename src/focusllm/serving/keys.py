"""API keys: a file of names and hashes, so that who reads it has no key. No torch.

Keys are made here, of 256 random bits: a plain SHA-256 of one cannot be guessed back.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from focusllm.errors import ConfigError
from focusllm.files import whole_file

NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)


class Keys:
    """Who may use a server.

    Args:
        hashes: by owner.
    """

    def __init__(self, hashes: dict[str, str] | None = None):
        self._hashes = dict(hashes or {})

    def __len__(self) -> int:
        return len(self._hashes)

    def owner(self, key: str) -> str | None:
        """Whose key it is; None: nobody's. Takes the same time for any key."""
        digest, found = hash_of(key), None
        for owner, known in self._hashes.items():
            if hmac.compare_digest(digest, known):
                found = owner
        return found

    @classmethod
    def load(cls, path: Path) -> Keys:
        """The keys of a file.

        Raises:
            ConfigError: it cannot be read, is no such file, or has no keys.
        """
        try:
            lines = path.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"the keys in {path} cannot be read ({reason}); make one with `focusllm key`.") from error
        hashes = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            owner, _, digest = line.strip().partition(" ")
            if not NAME.fullmatch(owner) or not re.fullmatch(r"[0-9a-f]{64}", digest) or owner in hashes:
                raise ConfigError(f"line {number} of {path} is no key; remove it, and make one with `focusllm key`.")
            hashes[owner] = digest
        if not hashes:
            raise ConfigError(f"{path} has no keys; make one with `focusllm key`.")
        return cls(hashes)

    @classmethod
    def create(cls, path: Path, owner: str) -> str:
        """A new key for an owner, added to a file; only its hash is written.

        Raises:
            ConfigError: the owner has one, or has no proper name; or the file cannot be used.
        """
        if not NAME.fullmatch(owner):
            raise ConfigError(f"the name {owner!r} does not do; use up to 64 letters, digits, or any of ._@-.")
        known = cls.load(path)._hashes if path.exists() else {}
        if owner in known:
            raise ConfigError(f"{owner} has a key in {path} already; remove that line, or take another name.")
        key = f"fk-{secrets.token_urlsafe(32)}"
        try:
            with whole_file(path) as part:
                part.write_text(
                    "".join(f"{name} {digest}\n" for name, digest in {**known, owner: hash_of(key)}.items())
                )
            path.chmod(0o600)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another file.") from error
        return key


def hash_of(key: str) -> str:
    """As it is kept."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
