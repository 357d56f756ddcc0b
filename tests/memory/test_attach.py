import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sparsemem.config import MemoryConfig
from sparsemem.errors import (
    ConfigError,
    LayerNotFoundError,
    NotAttachedError,
    UnknownArchitectureError,
)
from sparsemem.memory.attach import (
    attach_memory,
    before_read,
    detach_memory,
    find_blocks,
    find_ffn,
    memory_config,
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
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "phi": GROUPED,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "mixtral": {**GROUPED, "num_local_experts": 2},
}
MEMORY = {"num_keys": 8, "num_heads": 2, "top_k": 4, "query_dim": 4}
TOKENS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))

every_family = pytest.mark.parametrize("family", FAMILIES)


def make_model(family="llama"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES.get(family, {})})
    return AutoModelForCausalLM.from_config(config).eval()


def memory(**options):
    return MemoryConfig(**{"layers": (1,), **MEMORY, **options})


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def write_random_rows(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for pool in pools(model).values():
        pool.write(
            torch.arange(pool.num_slots), torch.randn(pool.num_slots, pool.value_dim, generator=generator)
        )


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
    pools(model)["layer_1"].write(torch.arange(64), torch.zeros(64, WIDTH))
    assert torch.equal(logits(model), before)


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


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
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


def test_replacing_a_network_of_two_bare_layers_is_a_config_error_and_changes_nothing():
    model = make_model("opt")
    before = logits(model)
    with pytest.raises(ConfigError, match=r"fc1\.\.fc2.*placement='add'"):
        attach_memory(model, memory(placement="replace"))
    assert torch.equal(logits(model), before)
    assert not list(memory_layers(model))


def test_gradients_reach_active_rows_and_nothing_else_need_move():
    model = attach_memory(make_model(), memory())
    active = pools(model)["layer_1"].activate(torch.arange(64))
    model.requires_grad_(False)
    active.requires_grad_(True)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert active.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradients_are_the_same_with_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = attach_memory(make_model(), memory()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        write_random_rows(model)
        active = pools(model)["layer_1"].activate(torch.arange(0, 64, 2))
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append(active.grad)
    torch.testing.assert_close(*gradients)


def test_layers_have_their_own_pools():
    model = attach_memory(make_model(), memory(layers=(2, 0)))
    assert [layer.block_index for layer in memory_layers(model)] == [0, 2]
    assert list(pools(model)) == ["layer_0", "layer_2"]
    before = logits(model)
    first, second = pools(model).values()
    first.write(torch.arange(64), torch.randn(64, WIDTH))
    assert second.is_empty()
    after_first = logits(model)
    second.write(torch.arange(64), torch.randn(64, WIDTH))
    assert not torch.equal(after_first, before)
    assert not torch.equal(logits(model), after_first)
    detach_memory(model)
    assert torch.equal(logits(model), before)


def test_layers_can_share_a_pool():
    model = attach_memory(make_model(), memory(layers=(0, 2), shared_pool=True))
    lower, upper = memory_layers(model)
    assert lower.pool is upper.pool
    assert list(pools(model)) == ["shared"]
    assert not torch.equal(lower.keys, upper.keys)
    before = logits(model)
    write_random_rows(model)
    assert not torch.equal(logits(model), before)
    detach_memory(model)
    assert torch.equal(logits(model), before)


def test_auto_is_one_layer_early_in_the_depth():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SHAPE, **GROUPED, "num_hidden_layers": 8})
    model = attach_memory(AutoModelForCausalLM.from_config(config), memory(layers="auto"))
    assert [layer.block_index for layer in memory_layers(model)] == [1]


def test_same_seed_gives_the_same_memory():
    first, second, other = (attach_memory(make_model(), memory(seed=seed)) for seed in (3, 3, 4))
    keys = [next(memory_layers(model)).keys for model in (first, second, other)]
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0], keys[2])


def test_bases_lie_behind_their_pools():
    base = torch.randn(64, WIDTH)
    model = make_model()
    before = logits(model)
    attach_memory(model, memory(layers=(0, 1)), {"layer_1": base})
    assert pools(model)["layer_0"].base is None
    assert pools(model)["layer_1"].base is base
    assert not torch.equal(logits(model), before)


def test_base_of_another_shape_leaves_the_model_as_it_was():
    model = make_model()
    before = logits(model)
    with pytest.raises(ConfigError, match="base has shape"):
        attach_memory(model, memory(layers=(0, 1)), {"layer_1": torch.zeros(3, WIDTH)})
    assert not list(memory_layers(model))
    assert torch.equal(logits(model), before)


def test_base_for_a_pool_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match="layer_2"):
        attach_memory(make_model(), memory(), {"layer_2": torch.zeros(64, WIDTH)})


def test_generate_equals_greedy_decoding_without_a_cache():
    model = attach_memory(make_model(), memory())
    write_random_rows(model)
    found = model.generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    expected = TOKENS
    for _ in range(4):
        scores = logits(model, expected)[:, -1].index_fill(1, torch.tensor([2]), -torch.inf)
        expected = torch.cat([expected, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)


def test_bfloat16_model_runs_with_a_float32_memory():
    model = attach_memory(make_model().to(torch.bfloat16), memory())
    before = logits(model)
    write_random_rows(model)
    assert next(memory_layers(model)).keys.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("layers", [(DEPTH,), (0, 40), (-1,)])
def test_layer_out_of_range_names_value_depth_and_remedy(layers):
    model = make_model()
    with pytest.raises(LayerNotFoundError) as caught:
        attach_memory(model, memory(layers=layers))
    message = str(caught.value)
    assert f"layers={layers}" in message
    assert "3 blocks (0..2)" in message
    assert "pass layers=(1,)" in message
    assert not list(memory_layers(model))


def test_rows_of_another_width_cannot_be_added():
    with pytest.raises(ConfigError, match=r"value_dim=16.*width 32"):
        attach_memory(make_model(), memory(value_dim=16))


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


def test_attaching_twice_is_an_error_that_keeps_the_first_memory():
    model = attach_memory(make_model(), memory())
    layer = next(memory_layers(model))
    with pytest.raises(NotAttachedError, match="detach_memory"):
        attach_memory(model, memory(layers=(2,)))
    assert list(memory_layers(model)) == [layer]


@pytest.mark.parametrize("ask", [pools, detach_memory, memory_config])
def test_a_model_without_memory_is_an_error(ask):
    with pytest.raises(NotAttachedError, match="attach_memory"):
        ask(make_model())


def test_detached_model_can_get_another_memory():
    model = make_model()
    before = logits(model)
    detach_memory(attach_memory(model, memory()))
    attach_memory(model, memory(layers=(2,)))
    assert memory_config(model).layers == (2,)
    assert torch.equal(logits(model), before)


class Wrapper(nn.Module):
    """What peft and data-parallel engines do: the model is a part of another."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def get_base_model(self):
        return self.inner

    def forward(self, tokens):
        return self.inner(tokens)


@pytest.mark.parametrize("wrap_first", [True, False])
def test_a_wrapped_model_attaches_and_detaches(wrap_first):
    model = make_model()
    before = logits(model)
    if wrap_first:
        wrapped = attach_memory(Wrapper(model), memory())
    else:
        wrapped = Wrapper(attach_memory(model, memory()))
    assert memory_config(wrapped) == memory()
    write_random_rows(wrapped)
    assert not torch.equal(logits(wrapped), before)
    detach_memory(wrapped)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("placement", ["add", "replace"])
def test_deep_copy_is_independent(placement):
    model = attach_memory(make_model(), memory(layers=(0, 1), placement=placement))
    write_random_rows(model)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    write_random_rows(twin, seed=2)
    assert torch.equal(logits(model), before)
    changed = logits(twin)
    assert not torch.equal(changed, before)
    write_random_rows(model, seed=3)
    assert torch.equal(logits(twin), changed)
    after = logits(model)
    detach_memory(twin)
    assert torch.equal(logits(model), after)
    assert torch.equal(logits(twin), logits(make_model()))


def test_before_read_is_called_in_every_layer_and_only_inside():
    model = attach_memory(make_model(), memory(layers=(0, 2)))
    seen = []
    with before_read(model, lambda layer, hidden, slots: seen.append((layer.block_index, slots.shape))):
        logits(model)
    logits(model)
    assert seen == [(0, (2, 7, 2, 4)), (2, (2, 7, 2, 4))]


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "mixtral"])
def test_observing_reads_runs_nothing_above_the_highest_memory(family):
    model = attach_memory(make_model(family), memory(layers=(0, 1)))
    above = []
    handle = find_blocks(model)[2].register_forward_hook(lambda *_: above.append(1))
    full, seen = {}, {}
    with before_read(model, lambda layer, _, slots: full.update({layer.block_index: slots})):
        logits(model)
    assert above.pop() == 1
    observe_reads(model, lambda layer, _, slots: seen.update({layer.block_index: slots}), input_ids=TOKENS)
    handle.remove()
    assert above == []
    assert seen.keys() == full.keys() == {0, 1}
    assert all(torch.equal(seen[index], full[index]) for index in seen)


def test_an_error_inside_a_hook_is_raised_and_leaves_no_hook_behind():
    model = attach_memory(make_model(), memory())

    def fail(*_):
        raise RuntimeError("from the hook")

    with pytest.raises(RuntimeError, match="from the hook"):
        observe_reads(model, fail, input_ids=TOKENS)
    assert next(memory_layers(model)).before_read is None
    assert logits(model).isfinite().all()
