import json
import shutil
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import content

from sparsemem.errors import CheckpointError, HistoryError, MissingFileError, SparsememError
from sparsemem.memory.checkpoint import save
from sparsemem.store.archive import MANIFEST, export, import_archive
from sparsemem.store.history import DeltaStore
from sparsemem.store.integrity import verify

from .conftest import Learner


@pytest.fixture
def copy(store, tmp_path):
    """The same memory elsewhere, without a history."""
    shutil.copytree(store.folder, tmp_path / "copy")
    return DeltaStore(tmp_path / "copy")


@pytest.fixture
def archive(copy, store, learner, tmp_path):
    """A file with two branches and a tag."""
    learner.commit([1, 2], facts=["Ana"])
    store.create_ref("branch", "team/b")
    store.create_ref("tag", "v1")
    learner.commit([3])
    store.checkout("team/b")
    learner.commit([4])
    assert export(store, tmp_path / "all.zip") == 3
    return tmp_path / "all.zip"


def test_what_was_exported_is_imported(store, learner, copy, archive):
    made = import_archive(copy, archive)
    assert made == {f"imported/{name}": target for name, target in store.refs().items()}
    assert copy.head() is None
    for name, target in made.items():
        assert copy.log(name) == store.log(target)
        assert torch.equal(Learner(copy, learner.pool).rows(name), learner.rows(target))
    assert verify(copy) == []
    before = content(copy.folder)
    assert import_archive(copy, archive) == made
    assert content(copy.folder) == before


def test_one_version_is_exported_with_what_it_was_made_from(store, archive, copy, tmp_path):
    assert export(store, tmp_path / "one.zip", ["v1"]) == 1
    assert export(store, tmp_path / "two.zip", ["main~0", "team/b"]) == 3
    made = import_archive(copy, tmp_path / "one.zip")
    assert list(made) == ["imported/v1"]
    assert len(import_archive(copy, tmp_path / "two.zip")) == 2
    with pytest.raises(HistoryError, match="'nonsense'"):
        export(store, tmp_path / "none.zip", ["nonsense"])
    assert not (tmp_path / "none.zip").exists()


def test_an_archive_of_another_memory_is_refused(archive, tiny_model, tmp_path):
    from sparsemem.config import MemoryConfig
    from sparsemem.memory.attach import attach_memory, detach_memory

    detach_memory(tiny_model)
    other = attach_memory(
        tiny_model, MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, query_dim=4, seed=1)
    )
    save(other, tmp_path / "other", base_model="nowhere")
    with pytest.raises(CheckpointError, match="from another memory"):
        import_archive(DeltaStore(tmp_path / "other"), archive)
    assert not (tmp_path / "other" / "history.sqlite").exists()


def test_a_file_that_is_not_there_is_named(copy):
    with pytest.raises(MissingFileError, match=r"none\.zip"):
        import_archive(copy, copy.folder / "none.zip")


def rewritten(archive, change, compression=zipfile.ZIP_STORED):
    """The archive with its manifest and members changed by a function of both."""
    with zipfile.ZipFile(archive) as source:
        members = {name: source.read(name) for name in source.namelist()}
    manifest = json.loads(members.pop(MANIFEST))
    change(manifest, members)
    path = archive.with_name("changed.zip")
    with zipfile.ZipFile(path, "w", compression) as target:
        target.writestr(MANIFEST, json.dumps(manifest))
        for name, content in members.items():
            target.writestr(name, content)
    return path


def first(commits):
    return commits[next(iter(commits))]


HOSTILE = {
    "path escape": lambda m, f: f.update({"../../evil.safetensors": b""}),
    "absolute path": lambda m, f: f.update({"/tmp/evil": b""}),
    "unknown member": lambda m, f: f.update({"run.py": b"print()"}),
    "missing object": lambda m, f: f.pop(next(iter(f))),
    "flipped byte": lambda m, f: f.update({k: v[:-1] + bytes([v[-1] ^ 1]) for k, v in f.items()}),
    "other message": lambda m, f: first(m["commits"]).update(message="harmless"),
    "other facts": lambda m, f: first(m["commits"]).update(details="{}"),
    "missing parent": lambda m, f: (
        [m["commits"].pop(i) for i, c in list(m["commits"].items()) if not c["parent"]]
        and m["refs"].pop("v1")
    ),
    "more in a commit": lambda m, f: first(m["commits"]).update(more=1),
    "ref to nothing": lambda m, f: m["refs"].update(x="0" * 64),
    "ref with an escape": lambda m, f: m["refs"].update({"../x": next(iter(m["commits"]))}),
    "newer": lambda m, f: m.update(format_version=2),
    "foreign": lambda m, f: m.update(format="zip"),
    "no commits": lambda m, f: m.pop("commits"),
    "commits as a list": lambda m, f: m.update(commits=[1]),
    "commit as a text": lambda m, f: m["commits"].update({next(iter(m["commits"])): "x"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_before_anything_is_written(archive, copy, name):
    path = rewritten(archive, HOSTILE[name])
    before = sorted(copy.folder.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=path.name):
        import_archive(copy, path)
    assert sorted(copy.folder.parent.rglob("*")) == before


def test_compressed_members_are_refused(archive, copy):
    path = rewritten(archive, lambda m, f: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        import_archive(copy, path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(archive, copy, data):
    content = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = archive.with_name("damaged.zip")
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        import_archive(copy, path)
    except SparsememError:
        assert len(copy) == 0
    assert verify(copy) == []
