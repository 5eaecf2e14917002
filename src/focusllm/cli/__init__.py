"""The command line: a thin shell over the library. Nothing heavy is imported before a command needs it."""

from __future__ import annotations


def main() -> None:
    """Run the command line (see `process.run` for how it ends)."""
    from focusllm.cli.process import run

    run("focusllm.cli.app")
