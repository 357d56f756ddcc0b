import pytest
import torch

from sparsemem.config import MemoryConfig
from sparsemem.errors import ConfigError, DataError
from sparsemem.memory.attach import attach_memory, memory_config, memory_layers, observe_reads, pools
from sparsemem.memory.fit_keys import fit_keys
from sparsemem.memory.grow import grow_memory
from sparsemem.memory.pool import Pool

SHAPE = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, query_dim=4, relation_dim=0)


@pytest.fixture
def fitted(tiny_model, tiny_tokenizer, texts):
    attach_memory(tiny_model, SHAPE)
    return fit_keys(tiny_model, tiny_tokenizer, texts, num_tokens=1500)


def states_of(model, tokenizer, text):
    found = []
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    observe_reads(model, lambda _layer, reads: found.append(reads.hidden[0]), input_ids=ids)
    return found[0]


@pytest.fixture
def states(fitted, tiny_tokenizer):
    return torch.cat([states_of(fitted, tiny_tokenizer, text) for text in ("Zed ran", "The baker walked")])


def test_kept_states_read_the_same_slots_with_the_same_weights(fitted, tiny_tokenizer, texts, states):
    (layer,) = memory_layers(fitted)
    before_ids, before_weights = layer.lookup(states)
    pools(fitted)["layer_1"].write(before_ids.unique(), torch.randn(len(before_ids.unique()), 32))
    answers = layer(states)
    growth = grow_memory(fitted, tiny_tokenizer, texts, 16, {1: states})[1]
    ids, weights = layer.lookup(states)
    assert torch.equal(ids, before_ids)
    torch.testing.assert_close(weights, before_weights)
    torch.testing.assert_close(layer(states), answers)
    assert (growth.num_kept_states, growth.num_moved_states) == (len(states), 0)
    assert memory_config(fitted).num_keys == layer.num_keys == 16
    assert pools(fitted)["layer_1"].num_slots == 256


def test_what_nobody_asked_to_keep_moves_to_new_slots_and_that_is_measured(
    fitted, tiny_tokenizer, texts, states
):
    (layer,) = memory_layers(fitted)
    before, _ = layer.lookup(states)
    growth = grow_memory(fitted, tiny_tokenizer, texts, 16)[1]
    after, weights = layer.lookup(states)
    assert (after >= 64).any(), "else the kept states of the other test had nothing to be kept from"
    assert not torch.equal(before, after)
    assert 0 < growth.new < 1
    assert 0 < growth.kept < 1
    assert growth.num_kept_states == 0
    assert weights[after >= 64].any()


def test_old_sub_keys_stay_as_they_are(fitted, tiny_tokenizer, texts):
    (layer,) = memory_layers(fitted)
    keys, bias = layer.keys.clone(), layer.key_bias.clone()
    grow_memory(fitted, tiny_tokenizer, texts, 11)
    assert torch.equal(layer.keys[:, :, :8], keys)
    assert torch.equal(layer.key_bias[:, :, :8], bias)
    assert layer.keys.shape[2] == layer.key_bias.shape[2] == 11


@pytest.mark.parametrize("num_keys", [4, 8])
def test_a_memory_does_not_shrink(fitted, tiny_tokenizer, texts, num_keys):
    with pytest.raises(ConfigError, match=f"num_keys={num_keys}, and the memory has 8"):
        grow_memory(fitted, tiny_tokenizer, texts, num_keys)
    assert pools(fitted)["layer_1"].num_slots == 64


def test_too_little_text_is_refused_and_nothing_is_changed(fitted, tiny_tokenizer, texts):
    (layer,) = memory_layers(fitted)
    keys = layer.keys.clone()
    with pytest.raises(DataError, match="too few to fit 992 new sub-keys"):
        grow_memory(fitted, tiny_tokenizer, texts[:3], 1000)
    assert torch.equal(layer.keys, keys)
    assert pools(fitted)["layer_1"].num_slots == 64


def test_a_base_table_cannot_grow(tiny_model, tiny_tokenizer, texts):
    attach_memory(tiny_model, SHAPE, {"layer_1": torch.randn(64, 32)})
    with pytest.raises(ConfigError, match="base table"):
        grow_memory(tiny_model, tiny_tokenizer, texts, 16)
    with pytest.raises(ConfigError, match="with a base table"):
        pools(tiny_model)["layer_1"].grow(256)


def test_a_pool_that_grows_keeps_its_rows():
    pool, rows = Pool(9, 4), torch.randn(2, 4)
    pool.write(torch.tensor([2, 8]), rows)
    pool.grow(16)
    assert torch.equal(pool.current(torch.tensor([2, 8])), rows)
    assert not pool.current(torch.tensor([9, 15])).any()
    pool.write(torch.tensor([15]), rows[:1])
    assert pool.written_ids.tolist() == [2, 8, 15]
    with pytest.raises(ConfigError, match="to a larger number"):
        pool.grow(9)
