import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparsemem.config import FinetuneConfig
from sparsemem.errors import ConfigError, DataError
from sparsemem.likelihood import label_log_probs
from sparsemem.memory.attach import memory_layers, pools
from sparsemem.training.examples import Example, collate
from sparsemem.training.penalties import (
    MAX_TOKENS,
    Background,
    Ewc,
    Guards,
    KlToBase,
    Replay,
    build_guards,
    diagonal_fisher,
    frozen_copy,
)

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FULL_PRECISION = contextlib.nullcontext()
METHODS = ["full", "lora", "memory"]


class Bigram(nn.Module):
    """The next token depends on the last alone, by a table of logits."""

    def __init__(self, size=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(size, size, generator=generator))

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits[input_ids])


def document(*ids):
    return Example(0, ids, ids, (False,) * len(ids))


class Given:
    """The same documents in every draw, whatever number is asked for."""

    def __init__(self, *documents):
        self.documents = documents

    def draw(self, _num_documents):
        return list(self.documents)


@pytest.fixture
def ready(attached):
    """Make the model as it is before the first step of a method, with its trained parameters."""

    def ready(method):
        if method == "full":
            return attached, list(attached.parameters())
        attached.requires_grad_(False)
        if method == "lora":
            adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
            model = get_peft_model(attached, adapter)
            return model, [p for p in model.parameters() if p.requires_grad]
        return attached, []

    return ready


def build(model, parameters, tokenizer, texts, method="full", **options):
    return build_guards(model, tokenizer, parameters, texts, FinetuneConfig(method=method, **options))


def move(model, parameters, method):
    """Change what the method trains, and return it."""
    torch.manual_seed(1)
    if method == "memory":
        pool = pools(model)["layer_1"]
        parameters = [pool.activate(torch.arange(pool.num_slots))]
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)
    return parameters


def gradients(parameters):
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@torch.no_grad()
def log_probs_of(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)


def test_each_document_is_drawn_once_before_any_comes_again(tiny_tokenizer, texts):
    drawn = Background(tiny_tokenizer, texts, seed=3).draw(2 * len(texts))
    first, second = drawn[: len(texts)], drawn[len(texts) :]
    assert set(first) == set(second)
    assert len(set(first)) == len(texts)
    assert first != second
    assert {tiny_tokenizer.decode(list(example.input_ids)) for example in first} == set(texts)
    assert all(example.labels == example.input_ids for example in drawn)


def test_the_order_is_that_of_the_seed_however_it_is_drawn(tiny_tokenizer, texts):
    drawn = Background(tiny_tokenizer, texts, seed=3).draw(9)
    background = Background(tiny_tokenizer, texts, seed=3)
    assert [*background.draw(2), *background.draw(7)] == drawn
    assert Background(tiny_tokenizer, texts, seed=4).draw(9) != drawn


def test_long_documents_are_cut_and_those_that_teach_nothing_left_out(tiny_tokenizer):
    long = "It was cold. " * 100
    drawn = Background(tiny_tokenizer, ["", "a", long], seed=0).draw(3)
    assert [len(example.input_ids) for example in drawn] == [MAX_TOKENS] * 3
    with pytest.raises(DataError, match="none of the 2 background texts has a token to predict; give"):
        Background(tiny_tokenizer, ["", "a"], seed=0)


def test_the_fisher_information_of_a_bigram_model_is_that_of_the_formula():
    """Of a categorical distribution with p = softmax(logits) it is p (1 - p)."""
    model = Bigram()
    # Token 3 follows every time: by the text's own labels the estimate would be another.
    documents = [document(0, 3, 0, 3, 1, 3)] * 2000
    generator = torch.Generator().manual_seed(0)
    (fisher,) = diagonal_fisher(model, [model.logits], documents, generator, FULL_PRECISION)
    p = model.logits.detach().softmax(-1)
    share = torch.tensor([2, 1, 0, 3]) / 6
    torch.testing.assert_close(fisher, share.unsqueeze(1) * p * (1 - p), rtol=0.15, atol=0)


def test_the_fisher_information_is_estimated_without_a_trace(tiny_model, tiny_tokenizer, texts):
    tiny_model.train()
    calls = []
    tiny_model.register_forward_pre_hook(lambda module, _args: calls.append(module.training))
    parameters, unused = list(tiny_model.parameters()), nn.Parameter(torch.ones(2))
    documents = Background(tiny_tokenizer, texts, seed=0).draw(5)
    state = torch.get_rng_state()
    first, second = (
        diagonal_fisher(
            tiny_model, [*parameters, unused], documents, torch.Generator().manual_seed(0), FULL_PRECISION
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [f.shape for f in first] == [p.shape for p in (*parameters, unused)]
    assert all(f.max() > 0 for f in first[:-1])
    assert not first[-1].any()
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == [False] * 10
    assert tiny_model.training
    assert all(p.grad is None for p in parameters)


def test_ewc_adds_the_gradient_of_its_loss():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    fisher = [torch.rand_like(p) for p in parameters]
    ewc = Ewc(parameters, fisher, weight=5.0)
    assert ewc.add_gradients(1) == 0
    assert not any(p.grad.any() for p in parameters)
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn_like(parameter)
    parameters[0].grad, parameters[1].grad = torch.ones(3, 2), None
    loss = sum(
        5 / 2 * (f * (p - s).square()).sum() for f, p, s in zip(fisher, parameters, start, strict=True)
    )
    expected = torch.autograd.grad(loss, parameters)
    assert ewc.add_gradients(1) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(parameters[0].grad, 1 + expected[0])
    torch.testing.assert_close(parameters[1].grad, expected[1])


def test_ewc_pulls_back_what_the_background_needs_and_only_that():
    parameter = nn.Parameter(torch.zeros(2))
    ewc = Ewc([parameter], [torch.tensor([1.0, 0.0])], weight=2.0)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(50):
        optimizer.zero_grad()
        ewc.add_gradients(1)
        optimizer.step()
    assert parameter[0].abs() < 1e-3
    assert parameter[1] == 1


def test_to_second_order_both_penalties_are_one():
    """One weight moves, so nothing lies off the diagonal."""
    model = Bigram()
    p = model.logits.detach().softmax(-1)
    exact = (torch.tensor([2, 1, 0, 3]) / 6).unsqueeze(1) * p * (1 - p)
    ewc = Ewc([model.logits], [exact], weight=3.0)
    kl = KlToBase(model, Given(document(0, 3, 1), document(0, 3, 3)), 3.0, FULL_PRECISION)
    with torch.no_grad():
        model.logits[0, 2] += 0.01
    assert ewc.add_gradients(1) == pytest.approx(kl.add_gradients(1), rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_kl_is_nothing_at_the_start_and_what_the_formula_says_later(ready, tiny_tokenizer, texts, method):
    model, parameters = ready(method)
    guards = build(model, parameters, tiny_tokenizer, texts, method, penalty="kl", penalty_weight=3.0)
    if method != "memory":
        assert guards.add_gradients(1) == pytest.approx(0, abs=1e-6)
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients(parameters))
    (kl,) = guards.guards
    kl.background = Given(*kl.background.draw(3))
    batch = collate(kl.background.draw(3))
    before = log_probs_of(model, batch)
    moved = move(model, parameters, method)
    model.zero_grad()
    difference = (before.exp() * (before - log_probs_of(model, batch))).sum(-1)
    expected = 3 * difference[batch.attention_mask.bool()].mean().item()
    assert expected > 1e-3
    assert guards.add_gradients(1) == pytest.approx(expected, rel=1e-3)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients(moved))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_along_the_kl_lowers_it(ready, tiny_tokenizer, texts, method):
    model, parameters = ready(method)
    guards = build(model, parameters, tiny_tokenizer, texts[:2], method, penalty="kl")
    moved = move(model, parameters, method)
    model.zero_grad()
    first = guards.add_gradients(1)
    with torch.no_grad():
        for parameter, gradient in zip(moved, gradients(moved), strict=True):
            parameter -= 0.01 * gradient
    assert guards.add_gradients(1) < first


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_copy_shares_what_is_frozen_and_stays_as_it_was(ready, method, logits_of):
    model, parameters = ready(method)
    pool = pools(model)["layer_1"]
    pool._base = [torch.randn(pool.num_slots, pool.value_dim)]
    logits = logits_of(model)
    model.train()
    base = frozen_copy(model)
    assert not any(module.training for module in base.modules())
    assert not any(p.requires_grad for p in base.parameters())
    assert all(p.requires_grad for p in parameters)
    trained = {id(parameter) for parameter in parameters}
    for (name, own), of_base in zip(model.named_parameters(), base.parameters(), strict=True):
        assert (own is of_base) == (id(own) not in trained), name
    assert next(memory_layers(base)).pool.base is pool.base
    move(model, parameters, method)
    model.eval()
    assert torch.equal(logits_of(base), logits)
    assert not torch.equal(logits_of(model), logits)


@pytest.mark.parametrize(("fraction", "num_sequences", "num_documents"), [(0.5, 20, 20), (0.1, 3, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_replay_adds_the_gradient_of_its_share_of_the_plain_loss(
    ready, tiny_tokenizer, texts, method, fraction, num_sequences, num_documents
):
    model, parameters = ready(method)
    guards = build(model, parameters, tiny_tokenizer, texts, method, replay_fraction=fraction, seed=7)
    assert guards.fact_weight == 1 - fraction
    moved = move(model, parameters, method)
    documents = Background(tiny_tokenizer, texts, seed=7).draw(num_documents)
    loss = -label_log_probs(model, *collate(documents).model_inputs).mean()
    plain = torch.autograd.grad(loss, moved, materialize_grads=True)
    assert max(gradient.abs().max() for gradient in plain) > 1e-3
    # Gradients of the facts are there already, and stay.
    for parameter in moved:
        parameter.grad = torch.ones_like(parameter)
    assert guards.add_gradients(num_sequences) == pytest.approx(fraction * loss.item(), rel=1e-5)
    for parameter, gradient in zip(moved, plain, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + fraction * gradient, rtol=1e-5, atol=1e-6)


def test_replay_draws_its_share_of_the_sequences(tiny_model, tiny_tokenizer, texts, monkeypatch):
    drawn, draw = [], Background.draw

    def counting(background, num_documents):
        drawn.append(num_documents)
        return draw(background, num_documents)

    monkeypatch.setattr(Background, "draw", counting)
    for fraction, num_sequences in [(0.5, 6), (0.25, 6), (0.8, 3), (0.01, 6), (0.5, 1)]:
        background = Background(tiny_tokenizer, texts, seed=0)
        Replay(tiny_model, background, fraction, FULL_PRECISION).add_gradients(num_sequences)
    assert drawn == [6, 2, 12, 1, 1]


def test_guards_add_up(tiny_model, tiny_tokenizer, texts):
    parameters = list(tiny_model.parameters())
    options = {"penalty": "ewc", "penalty_weight": 100.0, "replay_fraction": 0.4}
    guards = build(tiny_model, parameters, tiny_tokenizer, texts, **options)
    assert [type(guard) for guard in guards.guards] == [Ewc, Replay]
    move(tiny_model, parameters, "full")
    pull = guards.guards[0].add_gradients(2)
    alone = [gradient.clone() for gradient in gradients(parameters)]
    assert pull > 0
    tiny_model.zero_grad()
    total = guards.add_gradients(2)
    assert total > pull
    assert any(not torch.equal(a, b) for a, b in zip(alone, gradients(parameters), strict=True))


@pytest.mark.parametrize(
    "options", [{"penalty": "ewc"}, {"penalty": "kl"}, {"replay_fraction": 0.5}], ids=str
)
def test_one_seed_gives_one_run(tiny_model, tiny_tokenizer, texts, options):
    parameters, runs = list(tiny_model.parameters()), []
    start = [p.detach().clone() for p in parameters]
    for seed in (0, 0, 1):
        guards = build(tiny_model, parameters, tiny_tokenizer, texts, seed=seed, **options)
        move(tiny_model, parameters, "full")
        runs.append([guards.add_gradients(2) for _ in range(3)])
        with torch.no_grad():
            for parameter, before in zip(parameters, start, strict=True):
                parameter.copy_(before)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "options", [{"penalty": "ewc"}, {"penalty": "kl"}, {"replay_fraction": 0.5}], ids=str
)
def test_forward_passes_run_in_the_precision_asked_for(tiny_model, tiny_tokenizer, texts, options):
    dtypes = []
    head = tiny_model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, output: dtypes.append(output.dtype))
    parameters = list(tiny_model.parameters())
    for precision, dtype in [("no", torch.float32), ("bf16", torch.bfloat16)]:
        dtypes.clear()
        guards = build(tiny_model, parameters, tiny_tokenizer, texts, mixed_precision=precision, **options)
        move(tiny_model, parameters, "full")
        assert math.isfinite(guards.add_gradients(1))
        assert set(dtypes) == {dtype}
        assert any(gradient.any() for gradient in gradients(parameters))
        assert {gradient.dtype for gradient in gradients(parameters)} == {torch.float32}


def test_where_nothing_is_asked_nothing_is_needed(tiny_model, tiny_tokenizer):
    guards = build(tiny_model, [], tiny_tokenizer, [])
    assert guards == Guards()
    assert (guards.add_gradients(5), guards.fact_weight) == (0, 1)


@pytest.mark.parametrize(
    "options", [{"penalty": "ewc"}, {"penalty": "kl"}, {"replay_fraction": 0.2}], ids=str
)
def test_background_is_needed(tiny_model, tiny_tokenizer, options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}.* need background text.*; give some hundred"):
        build(tiny_model, [], tiny_tokenizer, [], **options)


@pytest.mark.parametrize("method", ["memory", "lora"])
def test_ewc_is_for_full_finetuning(tiny_model, tiny_tokenizer, texts, method):
    with pytest.raises(ConfigError, match=f"does not suit method='{method}'.*; use penalty='kl' or"):
        build(tiny_model, [], tiny_tokenizer, texts, method, penalty="ewc")
