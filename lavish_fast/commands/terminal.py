"""What all commands say on the terminal, and how."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

_KNOWN = (ValueError, OSError, RuntimeError, ImportError, ArithmeticError)


def one_line(error: Exception) -> str:
    """An error as people read it."""
    if hasattr(error, "format_message"):  # bad usage, found by typer or by a command
        text = error.format_message()
    elif isinstance(error, _KNOWN) and str(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (--debug before the command shows where)"
    return " ".join(text.split())


def say_error(text: str) -> None:
    """A line on stderr."""
    name = f" (rank {rank()})" if rank() else ""
    if text:  # there is none where help was printed instead
        print(f"lavish-fast{name}: {printable(text)}", file=sys.stderr)


def show_warning(message: Warning | str, *_: Any) -> None:
    """A line on stderr; takes what `warnings.showwarning` is called with."""
    print(f"warning: {printable(str(message))}", file=sys.stderr)


def rank() -> int:
    """Of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def printable(text: str | Path) -> str:
    """Names of files may hold anything: line breaks, terminal codes, bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def console() -> Console:
    """Where to print; silent in all processes of torchrun but the first."""
    from rich.console import Console

    return Console(quiet=rank() > 0, highlight=False)


def progress(console: Console) -> Progress:
    """A bar that is gone in the end. There is none but on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def facts_table(facts: Mapping[str, Any], title: str | None = None) -> Table:
    """A table of two columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(printable(value)))
    return table


@contextmanager
def bad_usage(*errors: type[Exception]) -> Iterator[None]:
    """These errors are what was typed to blame for."""
    try:
        yield
    except errors as error:
        raise typer.BadParameter(str(error)) from error
