import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsemem.files
from sparsemem.errors import CheckpointError, MissingFileError, OutputError
from sparsemem.memory.delta import FORMAT, RowChange, SparseDelta

SLOTS, WIDTH = 16, 3


def make_change(slot_ids, seed):
    before, after = torch.randn(2, len(slot_ids), WIDTH, generator=torch.Generator().manual_seed(seed))
    return RowChange(torch.tensor(slot_ids), before, after, SLOTS)


def make_delta(seed=0):
    changes = {"layer_1": make_change([1, 6, 9], seed), "layer_2": make_change([0, 15], seed + 1)}
    return SparseDelta(changes)


def test_save_then_load_is_the_same_delta(tmp_path):
    delta = make_delta()
    delta.save(tmp_path / "new folder" / "000001.safetensors", {"message": "was gelernt wurde: β"})
    loaded, metadata = SparseDelta.load(tmp_path / "new folder" / "000001.safetensors")
    assert loaded.digest == delta.digest
    assert metadata["message"] == "was gelernt wurde: β"
    for name, change in delta.changes.items():
        assert torch.equal(loaded.changes[name].slot_ids, change.slot_ids)
        assert torch.equal(loaded.changes[name].before, change.before)
        assert torch.equal(loaded.changes[name].after, change.after)
        assert loaded.changes[name].num_slots == SLOTS


def test_an_empty_delta_survives_save_and_load(tmp_path):
    SparseDelta({}).save(tmp_path / "empty.safetensors")
    assert SparseDelta.load(tmp_path / "empty.safetensors")[0].changes == {}


def test_unusual_values_survive_save_and_load_bit_for_bit(tmp_path):
    after = torch.tensor([[-0.0, torch.inf, 1e-45], [torch.nan, -torch.inf, 3e38]])
    change = RowChange(torch.tensor([0, 15]), torch.zeros(2, 3), after, SLOTS)
    SparseDelta({"pool.with.dots": change}).save(tmp_path / "delta.safetensors")
    loaded = SparseDelta.load(tmp_path / "delta.safetensors")[0].changes["pool.with.dots"]
    assert torch.equal(loaded.after.view(torch.int32), after.view(torch.int32))


def test_a_file_cut_short_anywhere_is_an_error(tmp_path):
    path = tmp_path / "delta.safetensors"
    make_delta().save(path)
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"delta\.safetensors"):
            SparseDelta.load(path)


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_a_flipped_byte_never_loads_as_other_rows(tmp_path, mask):
    path = tmp_path / "delta.safetensors"
    delta = make_delta()
    delta.save(path)
    content = path.read_bytes()
    loaded_anyway = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= mask
        path.write_bytes(damaged)
        try:
            assert SparseDelta.load(path)[0].digest == delta.digest
            loaded_anyway += 1
        except CheckpointError:
            continue
    # Only the format version may read as an older one.
    assert loaded_anyway <= 1


def header_of(**changes):
    sizes = {"num_slots.layer_1": str(SLOTS)}
    return {"format": FORMAT, "format_version": "1", **sizes, "digest": "0", **changes}


def tensors_of(change):
    return {f"{part}.layer_1": getattr(change, part) for part in ("slot_ids", "before", "after")}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "not a sparsemem-delta file"),
        (header_of(format="sparsemem-usage"), "sparsemem-usage"),
        (header_of(format_version="3"), "upgrade sparsemem"),
        (header_of(format_version="1.5"), "upgrade sparsemem"),
        (header_of(format_version="²"), "upgrade sparsemem"),
        (header_of(), "digest"),
        (header_of(**{"num_slots.layer_1": "many"}), "many"),
        ({key: value for key, value in header_of().items() if "num_slots" not in key}, "num_slots"),
    ],
    ids=["foreign", "other kind", "newer", "odd version", "superscript version", "digest", "size", "no size"],
)
def test_a_file_with_another_header_is_an_error(tmp_path, header, message):
    save_file(tensors_of(make_delta().changes["layer_1"]), tmp_path / "d.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=message):
        SparseDelta.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        {"slot_ids": torch.tensor([1, 9, 6])},
        {"slot_ids": torch.tensor([1, 6, 6])},
        {"slot_ids": torch.tensor([1, 6, SLOTS])},
        {"slot_ids": torch.tensor([-1, 6, 9])},
        {"slot_ids": torch.tensor([1, 6])},
        {"slot_ids": torch.tensor([1, 6, 9], dtype=torch.int32)},
        {"after": torch.zeros(3, WIDTH + 1)},
        {"after": torch.zeros(3, WIDTH, dtype=torch.float64)},
        {"before": torch.zeros(3 * WIDTH, 1), "after": torch.zeros(3 * WIDTH, 1)},
    ],
    ids=["order", "twice", "too high", "negative", "count", "id type", "width", "row type", "more rows"],
)
def test_slot_ids_and_rows_that_do_not_fit_together_are_an_error(tmp_path, damage):
    change = dataclasses.replace(make_delta().changes["layer_1"], **damage)
    delta = SparseDelta({"layer_1": change})
    delta.save(tmp_path / "delta.safetensors")
    with pytest.raises(CheckpointError, match="do not fit together"):
        SparseDelta.load(tmp_path / "delta.safetensors")


def test_a_part_that_is_missing_is_an_error(tmp_path):
    tensors = tensors_of(make_delta().changes["layer_1"])
    del tensors["before.layer_1"]
    save_file(tensors, tmp_path / "delta.safetensors", metadata=header_of())
    with pytest.raises(CheckpointError, match=r"before\.layer_1"):
        SparseDelta.load(tmp_path / "delta.safetensors")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", json.dumps({"a": 1}).encode()])
def test_a_file_that_is_no_safetensors_is_an_error(tmp_path, content):
    (tmp_path / "delta.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        SparseDelta.load(tmp_path / "delta.safetensors")


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist"):
        SparseDelta.load(tmp_path / "delta.safetensors")


def full_disk(tensors, path, metadata):
    path.write_bytes(b"half of it")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sparsemem.files, "save_file", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        make_delta().save(tmp_path / "delta.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    make_delta(seed=1).save(tmp_path / "delta.safetensors")
    monkeypatch.setattr(sparsemem.files, "save_file", full_disk)
    with pytest.raises(OutputError):
        make_delta(seed=2).save(tmp_path / "delta.safetensors")
    assert SparseDelta.load(tmp_path / "delta.safetensors")[0].digest == make_delta(seed=1).digest
    assert len(list(tmp_path.iterdir())) == 1


def make_tied_delta():
    rows = torch.tensor([[1.0, 2.0, 3.0], [-0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    slot_ids, after = torch.arange(SLOTS), rows[torch.arange(SLOTS) % 3]
    return SparseDelta({"layer_1": RowChange(slot_ids, torch.zeros(SLOTS, WIDTH), after, SLOTS)})


def test_a_row_that_many_slots_hold_is_stored_and_counted_once(tmp_path):
    delta = make_tied_delta()
    delta.save(tmp_path / "delta.safetensors")
    tensors = load_file(tmp_path / "delta.safetensors")
    assert tensors["before.layer_1"].shape == (1, WIDTH)
    assert tensors["after.layer_1"].shape == (3, WIDTH)
    assert delta.num_values == 3 * WIDTH
    loaded = SparseDelta.load(tmp_path / "delta.safetensors")[0]
    assert loaded.digest == delta.digest
    before, after = (change.changes["layer_1"].after.view(torch.int32) for change in (delta, loaded))
    assert torch.equal(before, after)


def test_a_file_of_format_1_which_has_a_row_for_each_slot_is_read(tmp_path):
    delta = SparseDelta({"layer_1": make_delta().changes["layer_1"]})
    header = {**header_of(), "digest": delta.digest}
    save_file(tensors_of(delta.changes["layer_1"]), tmp_path / "delta.safetensors", metadata=header)
    assert SparseDelta.load(tmp_path / "delta.safetensors")[0].digest == delta.digest


@pytest.mark.parametrize(
    "index",
    [torch.arange(SLOTS), torch.arange(SLOTS) - 1, torch.zeros(SLOTS, dtype=torch.int32), torch.zeros(1, 1)],
    ids=["too high", "negative", "type", "shape"],
)
def test_an_index_of_rows_that_are_not_there_is_an_error(tmp_path, index):
    path = tmp_path / "delta.safetensors"
    make_tied_delta().save(path)
    _, header = SparseDelta.load(path)
    save_file({**load_file(path), "after_index.layer_1": index}, path, metadata=header)
    with pytest.raises(CheckpointError, match=r"after_index of pool 'layer_1'"):
        SparseDelta.load(path)
