import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsemem.config import MemoryConfig
from sparsemem.errors import ConfigError, LayerNotFoundError, NotAttachedError
from sparsemem.memory.attach import (
    attach_memory,
    before_read,
    detach_memory,
    memory_config,
    memory_layers,
    observe_reads,
    pools,
)

WIDTH, DEPTH, VOCABULARY = 32, 3, 97
TOKENS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
MEMORY = {"num_keys": 8, "num_heads": 2, "top_k": 4, "query_dim": 4, "relation_dim": 0}


def make_model(depth=DEPTH):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


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


def test_gradients_reach_active_rows_and_nothing_else_need_move():
    model = attach_memory(make_model(), memory())
    active = pools(model)["layer_1"].activate(torch.arange(64))
    model.requires_grad_(False)
    active.requires_grad_(True)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert active.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("block", [0, 1])
def test_gradients_are_the_same_with_gradient_checkpointing(block):
    gradients = []
    for checkpointing in (False, True):
        model = attach_memory(make_model(), memory(layers=(block,))).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        write_random_rows(model)
        (pool,) = pools(model).values()
        active = pool.activate(torch.arange(0, 64, 2))
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append(active.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("block", "depth", "expected"), [(0, 0.0, 0), (0, 0.4, 1), (1, 0.0, 1), (0, 0.99, 1), (2, 0.4, 2)]
)
def test_an_answer_is_added_at_its_depth_but_not_before_it_is_read_nor_in_the_last_block(
    block, depth, expected
):
    model = attach_memory(make_model(), memory(layers=(block,), output_depth=depth))
    (layer,) = memory_layers(model)
    assert layer.output_index == expected
    before = model(TOKENS, output_hidden_states=True).hidden_states
    write_random_rows(model)
    after = model(TOKENS, output_hidden_states=True).hidden_states
    is_same = [torch.equal(*states) for states in zip(before, after, strict=True)]
    assert is_same == [index <= expected for index in range(4)]


def test_a_model_can_be_copied_after_a_pass_with_gradients():
    model = attach_memory(make_model(), memory(layers=(0,)))
    write_random_rows(model)
    (pool,) = pools(model).values()
    pool.activate(torch.arange(8))
    expected = model(TOKENS).logits
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, expected)


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
    model = attach_memory(make_model(depth=8), memory(layers="auto"))
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
    with before_read(model, lambda layer, reads: seen.append((layer.block_index, reads.slot_ids.shape))):
        logits(model)
    logits(model)
    assert seen == [(0, (2, 7, 2, 4)), (2, (2, 7, 2, 4))]


def test_an_error_inside_a_hook_is_raised_and_leaves_no_hook_behind():
    model = attach_memory(make_model(), memory())

    def fail(*_):
        raise RuntimeError("from the hook")

    with pytest.raises(RuntimeError, match="from the hook"):
        observe_reads(model, fail, input_ids=TOKENS)
    assert next(memory_layers(model)).before_read is None
    assert logits(model).isfinite().all()


def test_a_network_that_was_replaced_is_cast_along_with_the_model():
    model = attach_memory(make_model(), memory(placement="replace")).to(torch.bfloat16)
    detach_memory(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
