"""A history in one file, to carry to another copy of the same memory."""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemem.errors import CheckpointError, MissingFileError
from sparsemem.files import check_format, write_atomically
from sparsemem.memory.checkpoint import read_header
from sparsemem.store.commits import RECORD, commit_digest, insert
from sparsemem.store.history import DeltaStore
from sparsemem.store.objects import parse_object

FORMAT = "sparsemem-archive"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def export(store: DeltaStore, path: Path, revisions: Sequence[str] = ()) -> int:
    """Write versions and all they were made from to one file.

    Args:
        store: The history.
        path: The file.
        revisions: Versions; all branches and tags if none is given.

    Returns:
        The number of commits in it.

    Raises:
        HistoryError: There is no such version.
        OutputError: The file could not be written.
    """
    refs: dict[str, str | None] = {**store.refs()}
    if revisions:
        found = {name: store.resolve(name) for name in revisions}
        refs = {name if name in refs else f"commit-{str(of)[:10]}": of for name, of in found.items()}
    ids: dict[str, None] = {}
    for target in refs.values():
        ids |= store.ancestors(target)
    records = {
        row["id"]: {name: row[name] for name in RECORD}
        for row in store.database.rows("SELECT * FROM commits")
        if row["id"] in ids
    }
    header = read_header(store.folder)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "weights_sha256": header["weights_sha256"],
        "refs": {name: target for name, target in refs.items() if target is not None},
        "commits": records,
    }

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(MANIFEST, json.dumps(manifest))
            for sha in dict.fromkeys(record["object"] for record in records.values()):
                archive.writestr(f"{sha}.safetensors", store.objects.content(sha))

    write_atomically(path, write)
    return len(records)


def copy_history(store: DeltaStore, folder: Path) -> None:
    """Copy a history as it is to a folder without one.

    Raises:
        CheckpointError: An object is damaged.
        OutputError: The copy could not be written.
    """
    store.database.copy(folder)
    copy = DeltaStore(folder)
    for row in copy.database.rows("SELECT DISTINCT object FROM commits"):
        copy.objects.stage_bytes(store.objects.content(row["object"]))
    copy.settle()
    copy.database.close()


def import_archive(store: DeltaStore, path: Path) -> dict[str, str]:
    """Add the commits of an archive, and its branches as "imported/NAME"; nothing is checked out.

    Every byte is checked before the history is touched.

    Returns:
        The branches that were made, with their versions.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: It is damaged, foreign, of a newer format, or of another memory.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            manifest, objects = _checked(archive, path)
    except (zipfile.BadZipFile, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a valid archive ({error!r}); export it again") from error
    if manifest["weights_sha256"] != read_header(store.folder)["weights_sha256"]:
        raise CheckpointError(
            f"{path} was exported from another memory than {store.folder}; import it where that was attached"
        )
    known = {row["id"] for row in store.database.rows("SELECT id FROM commits")}
    commits: dict[str, dict[str, Any]] = manifest["commits"]
    for record in commits.values():
        for parent in (record["parent"], record["second_parent"]):
            if parent is not None and parent not in commits and parent not in known:
                raise CheckpointError(f"{path} lacks commit {parent[:10]}; export it again, with all parents")
    made = {}
    with store.database.writing() as connection:
        for content in objects.values():
            store.objects.stage_bytes(content)
        for commit_id, record in commits.items():
            insert(connection, commit_id, record)
        for name, target in manifest["refs"].items():
            made[f"imported/{name}"] = target
            connection.execute(
                "INSERT OR REPLACE INTO refs VALUES (?, 'branch', ?)", (f"imported/{name}", target)
            )
            store.note(connection, "import", f"imported/{name}", None, target)
    store.settle()
    return made


def _checked(archive: zipfile.ZipFile, path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read an archive; of what it holds nothing is trusted before its hash was taken."""
    objects = {}
    for entry in archive.infolist():
        # Stored as it is: what is read is never more than the file has, whatever its header says.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{path}: {entry.filename!r} is compressed, which no archive of ours is")
        if entry.filename != MANIFEST and not re.fullmatch(r"[0-9a-f]{64}\.safetensors", entry.filename):
            raise CheckpointError(f"{path} holds {entry.filename!r}, which no archive of ours does")
    manifest = json.loads(archive.read(MANIFEST))
    check_format(path, manifest, FORMAT, FORMAT_VERSION)
    for name, target in manifest["refs"].items():
        if not re.fullmatch(r"\w[\w./-]{0,200}", name) or target not in manifest["commits"]:
            raise CheckpointError(f"{path} names a version {name!r} that it does not hold; export it again")
    for commit_id, record in manifest["commits"].items():
        if set(record) != set(RECORD) or commit_digest(record) != commit_id:
            raise CheckpointError(f"{path}: commit {commit_id[:10]} is not what its id says; export it again")
        json.loads(record["details"])
        sha = record["object"]
        if sha not in objects:
            objects[sha] = archive.read(f"{sha}.safetensors")
            parse_object(objects[sha], sha, f"{path}: object {sha[:10]}")
    return manifest, objects
