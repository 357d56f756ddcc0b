"""Where a stream of facts comes from: a file that grows, a folder, standard input."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparsemem.data import LOCAL_SUFFIXES, Fact, jsonl_rows, load_facts, parse_fact
from sparsemem.errors import DataError, MissingFileError

STDIN = "-"


def facts_from(source: str, *, follow: bool = False, poll_seconds: float = 2.0) -> Iterator[Fact | None]:
    """Yield facts as they come.

    Args:
        source: A .jsonl file, a folder of files of facts, "-" for JSONL on standard input, or whatever
            `load_facts` reads.
        follow: Go on when the end is reached, as `tail --follow` does.
        poll_seconds: How often to look for more.

    Yields:
        Facts; None where there is no more for now.

    Raises:
        MissingFileError: There is no such file.
        DataError: A row is malformed (named by file and line).
    """
    if source == STDIN:
        yield from _parsed(enumerate(sys.stdin, 1), "stdin")
        return
    path = Path(source)
    if not path.is_dir() and path.suffix != ".jsonl":
        yield from load_facts(source)
        return
    reader = _Folder(path) if path.is_dir() else _GrowingFile(path)
    while True:
        yield from reader.new(final=not follow)
        if not follow:
            return
        yield None
        time.sleep(poll_seconds)


class _GrowingFile:
    """Reads what was appended since the last look: whole lines only, as the last one may be half-written."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist; check the path")
        self.path, self.offset, self.number = path, 0, 0

    def new(self, *, final: bool) -> Iterator[Fact]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n") and not final:
                    return
                self.offset += len(line)
                self.number += 1
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.path}:{self.number}: not UTF-8 text; convert it") from error
                yield from _parsed([(self.number, text)], str(self.path))


class _Folder:
    """Reads the files of a folder by name, each once, and later the new ones; .jsonl files may grow."""

    def __init__(self, path: Path) -> None:
        self.path, self.growing, self.read = path, dict[Path, _GrowingFile](), set[Path]()

    def new(self, *, final: bool) -> Iterator[Fact]:
        for path in sorted(self.path.iterdir()):
            if path.name.startswith(".") or path.suffix not in LOCAL_SUFFIXES:
                continue
            if path.suffix == ".jsonl":
                yield from self.growing.setdefault(path, _GrowingFile(path)).new(final=final)
            elif path not in self.read:
                yield from load_facts(path)
                self.read.add(path)


def _parsed(lines: Iterable[tuple[int, str]], name: str) -> Iterator[Fact]:
    return (parse_fact(row, where) for where, row in jsonl_rows(lines, name))
