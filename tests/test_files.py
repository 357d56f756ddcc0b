import errno
import stat

import pytest
import torch

from sparsemem.errors import CheckpointError, MissingFileError, OutputError
from sparsemem.files import (
    new_folder,
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_jsonl,
    write_tensors,
)


def full_disk(path):
    path.write_text("half of")
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_is_alone_and_readable_like_any_new_file(tmp_path):
    path, plain = tmp_path / "a" / "b.txt", tmp_path / "plain"
    write_atomically(path, lambda temporary: temporary.write_text("whole"))
    plain.touch()
    assert path.read_text() == "whole"
    assert names(path.parent) == ["b.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("old", ["old content", None])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, old):
    path = tmp_path / "file.txt"
    if old:
        path.write_text(old)
    before = names(tmp_path)
    with pytest.raises(OutputError, match=r"file\.txt: No space left on device; free space") as caught:
        write_atomically(path, full_disk)
    assert isinstance(caught.value, OSError)
    assert caught.value.exit_code == 1
    assert names(tmp_path) == before
    if old:
        assert path.read_text() == old


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_any_other_end_of_a_write_leaves_nothing_behind(tmp_path, error):
    def stop(temporary):
        temporary.write_text("half of")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "file.txt", stop)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(OutputError, match="file"), new_folder(tmp_path / "file" / "x"):
        pass


def test_a_new_folder_appears_only_when_it_is_filled(tmp_path):
    path, plain = tmp_path / "sub" / "new", tmp_path / "plain"
    plain.mkdir()
    with new_folder(path) as folder:
        (folder / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1"
    assert names(path.parent) == ["new"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_new_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "new").mkdir()
    with new_folder(tmp_path / "new") as folder:
        (folder / "x").touch()
    assert names(tmp_path / "new") == ["x"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (OutputError("as it is"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_folder_that_could_not_be_filled_vanishes(tmp_path, raised, expected):
    def fill_partly():
        with new_folder(tmp_path / "new") as folder:
            (folder / "x").write_text("half of")
            raise raised

    with pytest.raises(expected):
        fill_partly()
    assert names(tmp_path) == []


def test_a_folder_with_content_or_a_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("folder", "file"):
        with pytest.raises(OutputError, match=f"{name} exists already"), new_folder(tmp_path / name):
            pytest.fail("was entered")
    assert (tmp_path / "folder" / "mine").read_text() == (tmp_path / "file").read_text() == "kept"
    assert names(tmp_path) == ["file", "folder"]


def test_json_survives(tmp_path):
    value = {"a": [1, 2.5, None], "b": "ü\u2028"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    write_jsonl(tmp_path / "x.jsonl", [value, {}])
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")
    with pytest.raises(MissingFileError, match="x does not exist"):
        read_tensors(tmp_path / "x", "kind", 1)


def test_tensors_survive_with_their_header(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(0, 4)}
    write_tensors(tmp_path / "x", tensors, "kind", 2, {"note": "ü"})
    read, header = read_tensors(tmp_path / "x", "kind", 2)
    assert header == {"format": "kind", "format_version": "2", "note": "ü"}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_tensors_of_another_kind_or_a_newer_format_are_refused(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.zeros(1)}, "kind", 2, {})
    with pytest.raises(CheckpointError, match="not a other file"):
        read_tensors(tmp_path / "x", "other", 2)
    with pytest.raises(CheckpointError, match=r"version 2.*upgrade"):
        read_tensors(tmp_path / "x", "kind", 1)


@pytest.mark.parametrize("kept", [0, 4, 30, -1])
def test_truncated_tensors_are_named(tmp_path, kept):
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.zeros(8)}, "kind", 1, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="x is damaged or truncated"):
        read_tensors(path, "kind", 1)
