import contextlib
import dataclasses
import hashlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from sparsemem.errors import CheckpointError
from sparsemem.store.objects import FORMAT, StoredRows, parse_object, to_bytes


def make_object():
    ids = torch.tensor([1, 5, 9])
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    return {"p": StoredRows(ids, rows, torch.tensor([0, 1, 0]), rows[:1], torch.tensor([-1, 0, -1]), 16)}


def parse(content):
    return parse_object(content, hashlib.sha256(content).hexdigest(), "x.safetensors")


def test_what_was_written_is_read_and_the_same_content_gives_the_same_bytes():
    content = to_bytes(make_object())
    assert content == to_bytes(make_object())
    (rows,) = parse(content).values()
    for name, expected in vars(make_object()["p"]).items():
        found = getattr(rows, name)
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def test_slots_take_32_bits_where_the_pool_allows_it():
    large = {"p": dataclasses.replace(make_object()["p"], num_slots=2**31)}
    large["p"].slot_ids[-1] = 2**31 - 1
    assert torch.equal(parse(to_bytes(large))["p"].slot_ids, large["p"].slot_ids)
    kinds = [load(to_bytes(rows))["slot_ids.p"].dtype for rows in (make_object(), large)]
    assert kinds == [torch.int32, torch.int64]


CONTENT = to_bytes(make_object())


@given(place=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found(place, bit):
    damaged = bytearray(CONTENT)
    damaged[place] ^= 1 << bit
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        parse_object(bytes(damaged), hashlib.sha256(CONTENT).hexdigest(), "x.safetensors")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_bytes_whose_hash_is_right_are_still_checked(data):
    """A hostile object has the SHA-256 it is named by: whatever it holds is read, or refused by name."""
    damaged = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    with contextlib.suppress(CheckpointError):
        assert all(rows.is_valid() for rows in parse(bytes(damaged)).values())


TENSORS = {
    "slot_ids.p": torch.tensor([1, 5, 9]),
    "after.p": torch.zeros(1, 4),
    "after_index.p": torch.zeros(3, dtype=torch.int64),
    "before.p": torch.zeros(1, 4),
    "before_index.p": torch.zeros(3, dtype=torch.int64),
}
HEADER = {"format": FORMAT, "format_version": "1", "num_slots.p": "16"}


@pytest.mark.parametrize(
    ("change", "header"),
    [
        ({"slot_ids.p": torch.tensor([1, 1, 9])}, {}),
        ({"slot_ids.p": torch.tensor([-1, 5, 9])}, {}),
        ({"slot_ids.p": torch.tensor([1, 5, 16])}, {}),
        ({"slot_ids.p": torch.tensor([1.0, 5.0, 9.0])}, {}),
        ({"slot_ids.p": torch.tensor([1, 5])}, {}),
        ({"after_index.p": torch.tensor([0, 1, 0])}, {}),
        ({"after_index.p": torch.tensor([0, -1, 0])}, {}),
        ({"before_index.p": torch.tensor([0, -2, 0])}, {}),
        ({"before_index.p": torch.tensor([0, 0, 1])}, {}),
        ({"after.p": torch.zeros(1, 5)}, {}),
        ({"after.p": torch.zeros(1, 4, dtype=torch.float16)}, {}),
        ({"after.p": torch.zeros(4)}, {}),
        ({"more.p": torch.zeros(1)}, {}),
        ({"more.q": torch.zeros(1)}, {}),
        ({}, {"num_slots.p": "many"}),
        ({}, {"num_slots.p": "-4"}),
        ({}, {"format": "pt"}),
        ({}, {"format_version": "3"}),
        ({}, {"format_version": "one"}),
    ],
    ids=str,
)
def test_an_object_that_makes_no_sense_is_refused(change, header):
    assert parse(save(TENSORS, HEADER))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        parse(save({**TENSORS, **change}, {**HEADER, **header}))


def test_missing_parts_and_a_missing_header_are_refused():
    for name in TENSORS:
        with pytest.raises(CheckpointError):
            parse(save({key: value for key, value in TENSORS.items() if key != name}, HEADER))
    with pytest.raises(CheckpointError):
        parse(save(TENSORS))
    header = json.dumps({"__metadata__": {}}).encode()
    with pytest.raises(CheckpointError):
        parse(len(header).to_bytes(8, "little") + header)


def test_nothing_is_allocated_for_what_a_header_promises():
    header = {"after.p": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}
    text = json.dumps({"__metadata__": HEADER, **header}).encode()
    with pytest.raises(CheckpointError):
        parse(len(text).to_bytes(8, "little") + text)
