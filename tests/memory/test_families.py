"""What families of models the memory goes into, and how its places in them are found."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sparsemem.config import MemoryConfig
from sparsemem.errors import ConfigError, UnknownArchitectureError
from sparsemem.memory.attach import (
    attach_memory,
    before_read,
    detach_memory,
    find_blocks,
    find_ffn,
    memory_layers,
    observe_reads,
    pools,
)

WIDTH, DEPTH, VOCABULARY = 32, 3, 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": GROUPED,
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "phi": GROUPED,
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED,
    "smollm3": GROUPED,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "mixtral": {**GROUPED, "num_local_experts": 2},
}
MEMORY = {"num_keys": 8, "num_heads": 2, "top_k": 4, "query_dim": 4}
TOKENS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))

every_family = pytest.mark.parametrize("family", FAMILIES)


def make_model(family, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES.get(family, {}), **options})
    return AutoModelForCausalLM.from_config(config).eval()


def memory(**options):
    return MemoryConfig(**{"layers": (1,), **MEMORY, **options})


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def write_random_rows(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for pool in pools(model).values():
        rows = torch.randn(pool.num_slots, pool.value_dim, generator=generator)
        if pool.has_names:
            rows[:, 0] = 1
        pool.write(torch.arange(pool.num_slots), rows)


@every_family
def test_attached_memory_changes_no_logit_until_rows_are_written_and_detaches_exactly(family):
    model = make_model(family)
    before = logits(model)
    assert attach_memory(model, memory()) is model
    assert torch.equal(logits(model), before)
    write_random_rows(model)
    assert not torch.equal(logits(model), before)
    assert detach_memory(model) is model
    assert torch.equal(logits(model), before)


@every_family
def test_forward_equals_itself_with_rows_that_were_reset(family):
    model = make_model(family)
    before = logits(model)
    attach_memory(model, memory())
    write_random_rows(model)
    (pool,) = pools(model).values()
    pool.write(torch.arange(64), torch.zeros(64, pool.value_dim))
    assert torch.equal(logits(model), before)


@every_family
def test_names_read_go_along_in_the_cache(family):
    model = attach_memory(make_model(family), memory())
    write_random_rows(model)
    with torch.no_grad():
        cache = model(TOKENS[:, :4], use_cache=True).past_key_values
        found = model(TOKENS[:, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, logits(model)[:, 4:], rtol=1e-3, atol=1e-4)


@every_family
def test_state_dict_keys_of_the_base_are_unchanged_by_attach(family):
    model = make_model(family)
    before = list(model.state_dict())
    attach_memory(model, memory())
    attached = list(model.state_dict())
    assert [key for key in attached if ".memory." not in key] == before
    assert len(attached) > len(before)
    detach_memory(model)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("opt", "bloom")])
def test_replacing_memory_runs_and_detaches_exactly(family):
    model = make_model(family)
    before = logits(model)
    attach_memory(model, memory(placement="replace", value_dim=16))
    empty = logits(model)
    assert empty.isfinite().all()
    assert not torch.equal(empty, before)
    write_random_rows(model)
    assert not torch.equal(logits(model), empty)
    detach_memory(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("family", "network"), [("opt", r"fc1\.\.fc2"), ("bloom", "BloomMLP")])
def test_a_network_that_takes_more_than_the_hidden_state_is_not_replaced_and_nothing_changes(family, network):
    model = make_model(family)
    before = logits(model)
    with pytest.raises(ConfigError, match=f"{network}.*placement='add'"):
        attach_memory(model, memory(placement="replace"))
    assert torch.equal(logits(model), before)
    assert not list(memory_layers(model))


def test_a_model_without_feed_forward_network_names_its_parts():
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", **SHAPE)
    with pytest.raises(UnknownArchitectureError, match=r"MambaBlock.*ffn='\.\.\.'.*norm, mixer"):
        attach_memory(AutoModelForCausalLM.from_config(config), memory())


class OddBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.calm = nn.LayerNorm(WIDTH)
        self.squash = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, states):
        return states + self.squash(self.calm(states))


class OddModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig(hidden_size=WIDTH, num_hidden_layers=DEPTH)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.tower = nn.ModuleDict({"floors": nn.ModuleList(OddBlock() for _ in range(DEPTH))})
        self.others = nn.ModuleList(nn.Identity() for _ in range(DEPTH))

    def forward(self, tokens):
        states = self.words(tokens)
        for block in self.tower["floors"]:
            states = block(states)
        return states @ self.words.weight.T


@pytest.mark.parametrize(
    ("ffn", "placement"), [("squash", "add"), ("squash", "replace"), ("squash.0..squash.2", "add")]
)
def test_a_model_with_odd_names_works_with_blocks_and_ffn_named(ffn, placement):
    torch.manual_seed(0)
    model = OddModel()
    before = model(TOKENS)
    attach_memory(model, memory(blocks="tower.floors", ffn=ffn, placement=placement))
    write_random_rows(model)
    assert not torch.equal(model(TOKENS), before)
    detach_memory(model)
    assert torch.equal(model(TOKENS), before)


def test_blocks_that_are_not_the_only_candidates_must_be_named():
    with pytest.raises(UnknownArchitectureError, match=r"2 lists of 3 blocks.*tower\.floors, others"):
        attach_memory(OddModel(), memory(ffn="squash"))


@pytest.mark.parametrize("blocks", ["model.layerz", "tower", "words"])
def test_wrong_blocks_path_is_named_with_the_right_ones(blocks):
    with pytest.raises(UnknownArchitectureError, match=rf"blocks='{blocks}'.*tower\.floors"):
        attach_memory(OddModel(), memory(blocks=blocks, ffn="squash"))


@pytest.mark.parametrize("ffn", ["squish", "squash.0..squash.9", "auto"])
def test_wrong_ffn_path_is_named_with_the_parts_of_the_block(ffn):
    with pytest.raises(UnknownArchitectureError, match="calm, squash"):
        attach_memory(OddModel(), memory(blocks="tower.floors", ffn=ffn))


@every_family
def test_blocks_and_feed_forward_network_are_found(family):
    blocks = find_blocks(make_model(family))
    assert len(blocks) == DEPTH
    path, (first, last) = find_ffn(blocks[0])
    assert path == ("fc1..fc2" if family == "opt" else "mlp")
    assert (first is last) == (family != "opt")


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "mixtral"])
def test_observing_reads_runs_nothing_above_the_highest_memory(family):
    model = attach_memory(make_model(family), memory(layers=(0, 1)))
    above = []
    handle = find_blocks(model)[2].register_forward_hook(lambda *_: above.append(1))
    full, seen = {}, {}
    with before_read(model, lambda layer, reads: full.update({layer.block_index: reads.slot_ids})):
        logits(model)
    assert above.pop() == 1
    observe_reads(
        model, lambda layer, reads: seen.update({layer.block_index: reads.slot_ids}), input_ids=TOKENS
    )
    handle.remove()
    assert above == []
    assert seen.keys() == full.keys() == {0, 1}
    assert all(torch.equal(seen[index], full[index]) for index in seen)
