"""What a server allows, and where it listens. No torch."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from focusllm.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: one that is free."""
    model_id: str = "focusllm"
    """What clients call the model."""
    is_open: bool = False
    """Whether anyone who can reach it may use it, wherever it listens."""
    max_running: int = 16
    """Requests that are read and decoded at once."""
    max_waiting: int = 64
    """Requests that wait for that; more are refused (429)."""
    max_prompt_tokens: int = 1_000_000
    max_tokens: int = 4096
    """Of an answer."""
    default_tokens: int = 1024
    """Of an answer to a request that does not say."""
    max_choices: int = 8
    max_body: int = 32 * 2**20
    """Bytes of a request."""
    ping_seconds: float = 15.0
    """Of silence in a stream, after which it is said that all is well."""
    grace_seconds: float = 30.0
    """For requests that are under way when the server is to stop."""

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach it."""
        return is_loopback(self.host)

    def check(self, has_keys: bool) -> None:
        """Refuse to listen to the world without a lock.

        Raises:
            ConfigError: with the remedy.
        """
        if not (self.is_loopback or has_keys or self.is_open):
            raise ConfigError(
                f"the host {self.host} lets other machines in, but there are no API keys; give --keys FILE, or say "
                f"that anyone may use it with --open."
            )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine, for this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
