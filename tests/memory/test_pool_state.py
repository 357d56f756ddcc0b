"""What is kept of a pool: in a state dict, through casts, and over a base table in a file."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparsemem.memory.attach import pools
from sparsemem.memory.pool import Pool

from .test_pool import (
    EVERY,
    SLOTS,
    WIDTH,
    dense_read,
    make_pool,
    random_rows,
    same_bits,
    some_reads,
    train,
    with_and_without_base,
)


@with_and_without_base
def test_state_dict_round_trip_into_a_pool_with_other_rows(with_base):
    pool, other = make_pool(with_base), make_pool(with_base)
    pool.write(torch.tensor([3, 9, 1]), random_rows(3))
    other.write(torch.tensor([0, 9, 4, 5]), random_rows(4, seed=5))
    state = pool.state_dict()
    other.load_state_dict(state)
    assert same_bits(other.current(EVERY), pool.current(EVERY))
    assert sorted(other.written_ids.tolist()) == [1, 3, 9]
    assert set(state) == {"rows", "slot_ids", "slot_rows"}
    other.write(torch.tensor([3]), random_rows(1, seed=6))
    assert same_bits(pool.current(torch.tensor([3])), random_rows(3)[:1])


def test_state_dict_round_trip_of_a_model(attached, tiny_model):
    pool = pools(attached)["layer_1"]
    pool.write(torch.arange(5), torch.randn(5, 32))
    state = {name: value.clone() for name, value in attached.state_dict().items()}
    rows = pool.current(torch.arange(64))
    pool.write(torch.arange(3, 20), torch.randn(17, 32))
    attached.load_state_dict(state)
    assert same_bits(pool.current(torch.arange(64)), rows)
    assert pool.num_rows == 5


def test_state_dict_without_rows_is_reported_as_missing_keys():
    with pytest.raises(RuntimeError, match="rows"):
        Pool(SLOTS, WIDTH).load_state_dict({})


def test_casting_the_model_keeps_rows_keys_and_queries_float32(attached):
    pool = pools(attached)["layer_1"]
    pool.write(torch.arange(5), torch.randn(5, 32))
    before = {name: value.clone() for name, value in attached.state_dict().items() if ".memory." in name}
    active = pool.activate(torch.tensor([2, 40]))
    attached.to(torch.bfloat16)
    assert attached.lm_head.weight.dtype == torch.bfloat16
    assert pool.active is active
    assert active.dtype == torch.float32
    pool.deactivate()
    after = {name: value for name, value in attached.state_dict().items() if ".memory." in name}
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
        assert value.dtype == before[name].dtype, name


def test_memory_mapped_base_is_read_and_its_file_never_written(tmp_path):
    path = tmp_path / "base.safetensors"
    save_file({"values": random_rows(SLOTS, seed=7)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as file:
        pool = Pool(SLOTS, WIDTH, file.get_tensor("values"))
    expected = random_rows(SLOTS, seed=7)
    slot_ids, weights = some_reads()
    torch.testing.assert_close(pool.read(slot_ids, weights), dense_read(expected, slot_ids, weights))
    chosen = torch.tensor([8, 5, 0])
    active = pool.activate(chosen)
    train(pool, active, torch.optim.AdamW([active], lr=0.1, weight_decay=0.1), steps=3)
    pool.deactivate()
    pool.write(torch.tensor([8]), expected[[8]])
    assert not same_bits(pool.current(torch.tensor([5])), expected[[5]])
    assert same_bits(pool.base, expected)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_bfloat16_base_reads_as_its_float32_values():
    base = random_rows(SLOTS, seed=7).bfloat16()
    pool = Pool(SLOTS, WIDTH, base)
    assert same_bits(pool.current(EVERY), base.float())
    pool.write(torch.tensor([2]), base[[2]].float())
    assert pool.num_rows == 0
    slot_ids, weights = some_reads()
    assert pool.read(slot_ids, weights).dtype == torch.float32
