"""Files that are whole or not there: atomic writes, and safetensors with a format and a version."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsemem.errors import CheckpointError, ExistsError, MissingFileError, OutputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then rename it into place.

    Raises:
        OutputError: It could not be written (a full disk, a read-only folder); `path` is untouched
            and nothing is left beside it.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        # mkstemp makes private files; the result gets the rights any new file here would have.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every filesystem lets a folder be synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"could not write {path}: {reason}; free space or choose another folder") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """Raise ExistsError if `path` is a file, or a folder with content."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExistsError(f"{path} exists already; choose another folder or remove it")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path` to fill; it takes that name once filled, or vanishes.

    Raises:
        ExistsError: `path` has content already.
        OutputError: The folder could not be written.
    """
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror}; choose another folder") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"could not write {path}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, atomically; raises OutputError."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically; raises OutputError."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: It is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist; check the path") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object; restore it from a copy")
    return value


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], kind: str, version: int, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with its format and version in the header, atomically."""
    header = {"format": kind, "format_version": str(version), **metadata}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=header))


def read_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its header.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: It is damaged, of another kind or of a newer format.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            check_format(path, header, kind, version)
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); restore it from a copy") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_format(path: Path | str, header: Mapping[str, Any], kind: str, version: int) -> None:
    """Raise CheckpointError unless `header` names this format, in this version or an older one."""
    if header.get("format") != kind:
        raise CheckpointError(f"{path} is not a {kind} file (format: {header.get('format')!r})")
    if (
        not re.fullmatch("[0-9]+", str(header.get("format_version")))
        or int(header["format_version"]) > version
    ):
        raise CheckpointError(
            f"{path} has format version {header.get('format_version')}, this sparsemem reads up to "
            f"{version}; upgrade sparsemem"
        )


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
