"""What all commands share: errors, console, checks of flags."""

from __future__ import annotations

from pathlib import Path

import rich.console


class CommandError(Exception):
    """A command cannot run. Its message is one line on stderr, and the exit status is 2."""


class Console(rich.console.Console):
    """A console that lets `mla_fp8.__main__` handle a closed pipe."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def check_int(flag: str, value: int, allowed: range) -> None:
    """Raise `CommandError`, which names the flag, unless ``value`` is in ``allowed``."""
    if value not in allowed:
        raise CommandError(f"{flag} must be {allowed[0]} to {allowed[-1]}; got {value}")


def check_output(flag: str, path: Path) -> None:
    """Raise `CommandError` unless a file can be written at ``path``. The path is unchanged."""
    try:
        path = path.resolve()  # the target of a link
        new = not path.exists()
        if new or path.is_file() or path.is_dir():  # opening a pipe would wait for a reader
            with path.open("ab"):
                pass
        if new:
            path.unlink()
    except OSError as error:
        raise CommandError(f"{flag} can't be written: {error}") from None
