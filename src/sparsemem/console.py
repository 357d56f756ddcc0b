"""What people see: progress and tables on stderr. Stdout is for data. The only import of rich."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sparsemem.errors import SparsememError


class Step(Protocol):
    """Tells a progress bar how far the work is."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`, and a note behind it."""


# Of several processes the main one talks; its number is in the environment, so no torch is needed here.
stderr = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def say(text: str = "", style: str = "") -> None:
    """Write a line to stderr; `text` is printed as it is."""
    # Not folded at 80 columns where nobody looks: a line stays a line, a path stays whole.
    stderr.print(Text(text, style=style), soft_wrap=True)


def say_parts(parts: Iterable[tuple[str, str]]) -> None:
    """Write a text to stderr whose parts have a style each."""
    stderr.print(Text.assemble(*parts), soft_wrap=True)


def emit(text: str) -> None:
    """Write data to stdout."""
    if not stderr.quiet:
        print(text, flush=True)  # noqa: T201 - stdout is data


def emit_json(value: Any) -> None:
    """Write one JSON object to stdout."""
    emit(json.dumps(value, ensure_ascii=False, indent=2))


@contextlib.contextmanager
def progress(description: str) -> Iterator[Step]:
    """Show a progress bar on a terminal, and start and end of the work elsewhere.

    Yields:
        A function of (done, total, note).
    """
    if not stderr.is_terminal:
        say(f"{description} ...")
        yield _ignore_step
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=stderr) as bar:
        task = bar.add_task(description, total=None, note="")

        def step(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield step


def _ignore_step(done: int, total: int, note: str = "") -> None:
    pass


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stderr; columns after the first are right-aligned if they look like numbers."""
    shown = Table(title=title or None, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        numeric = number > 0 and all(row[number][:1] in "0123456789+-" for row in rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    stderr.print(shown)


def exit_code(run: Callable[[], int | None]) -> int:
    """Run a command's work; say its error in a line.

    Returns:
        What `run` returns, or 0; 2 for a user's mistake, 1 for a run that failed, 130 after Ctrl-C.
    """
    try:
        return run() or 0
    except SparsememError as error:
        stderr.quiet = False  # whichever process it is
        say(f"error: {error}", style="red")
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped; nothing was half-written")
        return 130
