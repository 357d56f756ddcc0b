import pytest
import torch

from sparsemem.errors import CheckpointError, ConfigError, ExistsError, MissingFileError
from sparsemem.memory.attach import pools
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.history import DeltaStore
from sparsemem.store.integrity import verify
from sparsemem.store.load import load
from sparsemem.study.grow import grow_folder
from sparsemem.study.learn import learn


@pytest.fixture
def taught(folder, facts, config):
    learn(folder, facts[:1], probes=[], config=config, message="one")
    learn(folder, facts[1:], probes=[], config=config, message="two")
    return folder


@pytest.fixture
def grown(taught, background, tmp_path):
    return grow_folder(taught, [str(background)], tmp_path / "grown", 16, num_tokens=1500, num_documents=20)


def test_rows_and_history_go_along(taught, grown, tmp_path):
    old, new = DeltaStore(taught), DeltaStore(tmp_path / "grown")
    assert new.log() == old.log()
    assert new.refs() == old.refs()
    assert verify(new) == []
    for revision in ("HEAD", "HEAD~1", "attached"):
        before, after = (pools(load(at, revision=revision)[0])["layer_1"] for at in (taught, new.folder))
        assert (before.num_slots, after.num_slots) == (64, 256)
        assert torch.equal(before.written_ids, after.written_ids)
        assert torch.equal(before.written()[1], after.written()[1])
    assert (grown["num_slots_before"], grown["num_slots"], grown["num_facts"]) == (64, 256, 2)
    assert grown["layers"]["1"]["num_kept_states"] > grown["layers"]["1"]["num_moved_states"] == 0


def test_it_goes_on_learning_and_takes_back_what_it_learned_before(grown, facts, config, tmp_path):
    out = tmp_path / "grown"
    model, _ = load(out)
    load_usage(out / USAGE_FILE).check(model)
    learn(out, facts, probes=[], config=config, message="again", replace=True)
    store = DeltaStore(out)
    assert [commit.message for commit in store.log()] == ["again", "two", "one"]
    for _ in range(3):
        store.undo()
    assert len(pools(load(out)[0])["layer_1"].written_ids) == 0


def test_a_memory_that_learned_nothing_grows_too(folder, background, tmp_path):
    result = grow_folder(folder, [str(background)], tmp_path / "grown", 9, num_tokens=1500, num_documents=20)
    assert result["num_facts"] == 0
    assert DeltaStore(tmp_path / "grown").log() == []
    assert load(tmp_path / "grown")


def test_a_mistake_leaves_no_folder(taught, background, tmp_path):
    out = tmp_path / "out"
    for source, num_keys, error in (
        (str(background), 8, ConfigError),
        (str(tmp_path / "none.txt"), 16, MissingFileError),
    ):
        with pytest.raises(error):
            grow_folder(taught, [source], out, num_keys)
        assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ExistsError):
        grow_folder(taught, [str(background)], out, 16)


def test_a_damaged_history_is_not_copied(taught, background, tmp_path):
    path = next((taught / "objects").glob("*/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        grow_folder(taught, [str(background)], tmp_path / "out", 16, num_tokens=1500, num_documents=20)
    assert not (tmp_path / "out").exists()
