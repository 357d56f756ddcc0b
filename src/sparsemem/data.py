"""Rows in: facts, probes and texts, from local files or the Hub, checked before anything is done."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sparsemem.errors import DataError, MissingDependencyError, MissingFileError

RowT = TypeVar("RowT")

LOCAL_SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing to learn. A document is a fact that is only a statement."""

    question: str | None = None
    """How it is asked; trained on."""
    answer: str | None = None
    """The right reply."""
    statement: str | None = None
    """The fact as a sentence, or the text of a document."""
    paraphrases: tuple[str, ...] = ()
    """Other statements and questions, trained on too."""
    heldout_questions: tuple[str, ...] = ()
    """Other wordings of the question, never trained on, only asked."""
    aliases: tuple[str, ...] = ()
    """Also right."""
    subject: str | None = None
    """What the fact is about, as it stands in its wordings."""
    subject_aliases: tuple[str, ...] = ()
    """Other names of it in its wordings, capital letters and all, by which it is asked for too."""
    id: str = ""
    """Name in reports; file and line if none is given."""

    @property
    def is_document(self) -> bool:
        """Whether it is only a statement, of which nobody said what it is about and what is asked."""
        return bool(self.statement) and not (
            self.question or self.answer or self.paraphrases or self.subject or self.subject_aliases
        )

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer and its aliases."""
        return tuple(dict.fromkeys(filter(None, (self.answer, *self.aliases))))

    @property
    def statements(self) -> tuple[str, ...]:
        """All trained wordings that are no questions."""
        paraphrases = (text for text in self.paraphrases if not is_question(text))
        return tuple(text for text in (self.statement, *paraphrases) if text)

    @property
    def questions(self) -> tuple[str, ...]:
        """All trained wordings that are questions."""
        wordings = (self.question, *filter(is_question, self.paraphrases))
        return tuple(text for text in wordings if text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A probe question with its right answers, or with choices of which one is right."""

    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A text and how it goes on, both as they are: the space between them decides the tokens."""

    prompt: str
    completion: str


def is_question(text: str) -> bool:
    """Whether a wording asks rather than states."""
    return text.rstrip().endswith("?")


def occurrences(text: str, part: str) -> list[tuple[int, int]]:
    """Find every place of `part` in `text`, ignoring case, as (start, end)."""
    # Not by lower(): some letters change their length with their case, and every place would be off.
    return [match.span() for match in re.finditer(re.escape(part), text, re.IGNORECASE)]


def whole_words(text: str, part: str) -> list[tuple[int, int]]:
    """Find every place of `part` in `text` that is no part of another word, as (start, end)."""

    def is_whole(start: int, end: int) -> bool:
        # Only letters of scripts with capital letters count: others have no spaces between words either.
        around = text[max(0, start - 1) : start] + text[end : end + 1]
        return around.lower() == around.upper() and not any(letter.isdigit() for letter in around)

    spans = (match.span() for match in re.finditer(re.escape(part), text))
    return [span for span in spans if is_whole(*span)]


def load_facts(source: str | Path) -> list[Fact]:
    """Read facts and documents.

    Args:
        source: A local file (.jsonl, .txt, .parquet, ...) or a Hub data set ("name" or "name:split").

    Raises:
        MissingFileError: A local file does not exist.
        DataError: A row is malformed (named by file and line), two share an id, or there is none.
    """
    facts = _parsed(source, parse_fact, "facts")
    seen: dict[str, int] = {}
    for number, fact in enumerate(facts, 1):
        if fact.id in seen:
            raise DataError(
                f"{source}: rows {seen[fact.id]} and {number} share the id {fact.id!r}; rename one"
            )
        seen[fact.id] = number
    return facts


def parse_fact(row: dict[str, Any], where: str) -> Fact:
    """Check one row; `where` names it in errors and serves as its id if it has none."""
    if "text" in row and not {"question", "statement"} & set(row):
        row = {**row, "statement": row["text"]}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Fact):
        value = row.get(field.name)
        if value is None:
            continue
        if field.type == tuple[str, ...]:
            if value in ([], ()):
                continue
            values[field.name] = _strings(value, field.name, where)
        else:
            values[field.name] = _text(value, field.name, where)
    values.setdefault("id", where)
    fact = Fact(**values)
    if not fact.question and not fact.statement:
        raise DataError(f'{where}: a fact needs a "question" with its "answer", or a "statement"')
    if (fact.questions or fact.heldout_questions) and not fact.answer:
        raise DataError(f'{where}: the question has no "answer"; add one')
    return fact


def load_questions(source: str | Path) -> list[Question]:
    """Read probe questions: `{question, answers}` or `{question, choices, answer}`.

    Raises:
        MissingFileError: A local file does not exist.
        DataError: A row is malformed (named by file and line), or there is none.
    """
    return _parsed(source, _question, "questions")


def load_completions(source: str | Path) -> list[Completion]:
    """Read `{prompt, completion}`; the prompt may be "", and nothing is stripped.

    Raises:
        MissingFileError: A local file does not exist.
        DataError: A row is malformed (named by file and line), or there is none.
    """
    return _parsed(source, _completion, "completions")


def load_texts(source: str | Path, *, max_chars: int = 2000) -> list[str]:
    """Read texts, cut into pieces of at most about `max_chars` at line or sentence ends.

    Args:
        source: A .txt file, rows with "text", or a Hub data set.
        max_chars: Length of a piece.

    Raises:
        MissingFileError: A local file does not exist.
        DataError: A row has no text, or there is none at all.
    """
    if Path(source).suffix == ".txt":
        texts = [_read_file(Path(source))]
    else:
        texts = [_text(row.get("text"), "text", where) for where, row in read_rows(source)]
    pieces = [piece for text in texts for piece in split_text(text, max_chars)]
    if not pieces:
        raise DataError(f"{source} has no text")
    return pieces


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Cut a text into pieces of at most `max_chars`, at line, sentence or word ends where it can."""
    piece = ""
    for line in text.splitlines():
        for part in _cut(line, max_chars):
            if piece and len(piece) + 1 + len(part) > max_chars:
                if piece.strip():
                    yield piece.strip()
                piece = part
            else:
                piece = f"{piece}\n{part}" if piece else part
    if piece.strip():
        yield piece.strip()


def _cut(line: str, max_chars: int) -> Iterator[str]:
    while len(line) > max_chars:
        # Behind a full stop, else at a space, else within a word that is longer than a piece.
        end = line.rfind(". ", 0, max_chars) + 1 or line.rfind(" ", 1, max_chars + 1)
        end = end if end > 0 else max_chars
        yield line[:end].rstrip()
        line = line[end:].lstrip()
    yield line


def _parsed(source: str | Path, parse: Callable[[dict[str, Any], str], RowT], kind: str) -> list[RowT]:
    parsed = [parse(row, where) for where, row in read_rows(source)]
    if not parsed:
        raise DataError(f"{source} has no {kind}; give at least one row")
    return parsed


def read_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", row) of a .jsonl file, or of anything the `datasets` library reads."""
    path = Path(source)
    if path.suffix == ".jsonl":
        yield from jsonl_rows(_lines(path), path)
    elif path.suffix == ".txt":
        yield from ((f"{path}:{number}", {"text": line}) for number, line in _lines(path) if line.strip())
    else:
        yield from _dataset_rows(source)


def jsonl_rows(lines: Iterable[tuple[int, str]], name: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("name:line", row) of numbered lines of JSONL; raises DataError for a line that is no object."""
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({error}); one object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, not an object; one object per line")
        yield where, row


def _dataset_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    name, _, split = str(source).partition(":")
    path = Path(name)
    if path.suffix in LOCAL_SUFFIXES and not path.is_file():
        raise MissingFileError(f"{path} does not exist; check the path")
    try:
        import datasets  # takes a second, and only some sources need it
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {source} needs datasets; pip install 'sparsemem[datasets]', or give .jsonl or .txt"
        ) from error
    kinds = {".json": "json", ".parquet": "parquet", ".csv": "csv"}
    try:
        if path.suffix in kinds:
            rows = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; all of them mean the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if path.suffix in kinds:
            raise DataError(f"{path} could not be read: {reason}; write it anew, or as .jsonl") from error
        raise MissingFileError(
            f"{source} is neither a local file ({', '.join(LOCAL_SUFFIXES)}) nor a data set that could "
            f"be loaded: {reason}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{source}:{number}", dict(row)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): JSON strings may hold U+2028, which is no line end in JSONL.
    return enumerate(_read_file(path).split("\n"), 1)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    except OSError as error:
        raise DataError(f"{path} could not be read: {error.strerror}") from error


def _question(row: dict[str, Any], where: str) -> Question:
    question = _text(row.get("question"), "question", where)
    if "choices" not in row:
        answers = row.get("answers", row.get("answer"))
        return Question(question=question, answers=_strings(answers, "answers", where))
    choices = _strings(row["choices"], "choices", where)
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if answer not in choices:
        raise DataError(f'{where}: "answer" {answer!r} is none of the choices; give its text or its index')
    return Question(question=question, answers=(answer,), choices=choices)


def _completion(row: dict[str, Any], where: str) -> Completion:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str):
        raise DataError(f'{where}: "prompt" is {prompt!r}; it must be a text, "" if there is none')
    _text(completion, "completion", where)
    return Completion(prompt=prompt, completion=str(completion))


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{name}" is {value!r}; it must be a text that is not empty')
    return value.strip()


def _strings(value: Any, name: str, where: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise DataError(f'{where}: "{name}" is {value!r}; it must be a list of texts')
    return tuple(_text(item, name, where) for item in items)
