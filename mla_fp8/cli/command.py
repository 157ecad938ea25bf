"""What the commands share: how they say that they can't, and where they print."""

from __future__ import annotations

from pathlib import Path

import rich.console


class CommandError(Exception):
    """Why a command can't do what it is asked to, in one line for stderr; exit status 2."""


class Console(rich.console.Console):
    """A console that leaves a closed pipe to `mla_fp8.__main__`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def check_int(flag: str, value: int, allowed: range) -> None:
    """Raise `CommandError`, naming the flag, unless a value is allowed."""
    if value not in allowed:
        raise CommandError(f"{flag} must be {allowed[0]} to {allowed[-1]}; got {value}")


def check_output(flag: str, path: Path) -> None:
    """Raise `CommandError` unless a file can be written there; leave things as they are."""
    try:
        path = path.resolve()  # the end of a link
        new = not path.exists()
        if new or path.is_file() or path.is_dir():  # opening a pipe would wait for a reader
            with path.open("ab"):
                pass
        if new:
            path.unlink()
    except OSError as error:
        raise CommandError(f"{flag} can't be written: {error}") from None
