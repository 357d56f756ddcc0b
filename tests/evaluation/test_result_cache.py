"""What an update cannot have changed is not computed again, and what it can have changed is."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
from tests.conftest import TINY_MEMORY, random_model

from sparsemem.config import MemoryConfig
from sparsemem.data import Completion
from sparsemem.evaluation.generate import answer_questions
from sparsemem.evaluation.probes import nll
from sparsemem.evaluation.result_cache import ResultCache
from sparsemem.memory.attach import attach_memory, memory_layers, observe_reads, pools
from sparsemem.prompts import SHOTS, qa_examples

QUESTIONS = [
    *(f"Who walked along the river on day {day}?" for day in range(6)),
    "What is tin?",
    "My old aunt!",
    "Nobody",
]


@pytest.fixture(params=[(1,), (0, 2)], ids=["one layer", "two layers"])
def model(request):
    # Few of 1,024 slots are read by any one text.
    config = dataclasses.replace(TINY_MEMORY, layers=request.param, num_keys=32, num_heads=4, top_k=2)
    return attach_memory(random_model().eval(), config)


@contextlib.contextmanager
def counted(model):
    """Count the forward passes of a model in here."""
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()


def likelihoods(model, tokenizer, texts, results=None):
    """Each in a batch of its own."""
    return [
        nll(model, tokenizer, [Completion(prompt=text[:8], completion=text[8:])], results=results).value
        for text in texts
    ]


def answers(model, tokenizer, results=None):
    options = {"max_new_tokens": 4, "batch_size": 1, "results": results}
    return answer_questions(model, tokenizer, QUESTIONS, prompt="chat", **options)


def teach(model, tokenizer, text, size=30.0, num_layers=2):
    """Give the slots that a text reads at its first digit, or at its end, a row: one in each layer."""
    tokens = tokenizer(text)["input_ids"]
    place = next((i for i, token in enumerate(tokens) if tokenizer.decode(token).strip().isdigit()), -1)
    for layer in itertools.islice(memory_layers(model), num_layers):
        read = {}
        observe_reads(
            model, lambda asked, reads, r=read: r.update({asked: reads}), input_ids=torch.tensor([tokens])
        )
        slot_ids = read[layer].slot_ids[0, place].unique()
        row = size * torch.randn(1, layer.pool.value_dim, generator=torch.Generator().manual_seed(0))
        pools(model)[layer.pool_name].write(slot_ids, row, torch.zeros(len(slot_ids), dtype=torch.int64))


@torch.no_grad()
def test_only_what_the_memory_answers_runs_again(model, tiny_tokenizer, texts):
    results = ResultCache()
    before = likelihoods(model, tiny_tokenizer, texts, results)
    assert before == likelihoods(model, tiny_tokenizer, texts)
    with counted(model) as passes:
        assert likelihoods(model, tiny_tokenizer, texts, results) == before
    assert not passes
    teach(model, tiny_tokenizer, texts[47])
    expected = likelihoods(model, tiny_tokenizer, texts)
    changed = sum(old != new for old, new in zip(before, expected, strict=True))
    with counted(model) as passes:
        assert likelihoods(model, tiny_tokenizer, texts, results) == expected
    assert 0 < changed <= len(passes) < len(texts)


@torch.no_grad()
def test_answers_are_those_of_a_model_that_runs_again(model, tiny_tokenizer):
    results = ResultCache()
    before = answers(model, tiny_tokenizer, results)
    with counted(model) as all_passes:
        assert answers(model, tiny_tokenizer) == before
    teach(model, tiny_tokenizer, QUESTIONS[4], size=300.0, num_layers=1)
    expected = answers(model, tiny_tokenizer)
    assert expected != before
    with counted(model) as passes:
        assert answers(model, tiny_tokenizer, results) == expected
    assert 0 < len(passes) < len(all_passes)


@torch.no_grad()
def test_an_answer_to_what_all_prompts_share_counts_for_each(model, tiny_tokenizer):
    def ask(results=None):
        return answer_questions(model, tiny_tokenizer, QUESTIONS[:3], max_new_tokens=4, results=results)

    results = ResultCache()
    before = ask(results)
    teach(model, tiny_tokenizer, qa_examples(SHOTS), size=300.0)
    expected = ask()
    assert expected != before
    assert ask(results) == expected


@torch.no_grad()
def test_what_was_answered_before_always_runs(taught, tiny_tokenizer, texts):
    results = ResultCache()
    before = likelihoods(taught, tiny_tokenizer, texts[:3], results)
    with counted(taught) as passes:
        assert likelihoods(taught, tiny_tokenizer, texts[:3], results) == before
    assert len(passes) == 3


@torch.no_grad()
def test_a_memory_over_a_base_table_always_answers(tiny_tokenizer, texts):
    base = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    model = attach_memory(random_model().eval(), TINY_MEMORY, {"layer_1": base})
    results = ResultCache()
    likelihoods(model, tiny_tokenizer, texts[:2], results)
    with counted(model) as passes:
        likelihoods(model, tiny_tokenizer, texts[:2], results)
    assert len(passes) == 2


@torch.no_grad()
def test_without_a_quorum_any_slot_that_was_written_counts(tiny_tokenizer, texts):
    config = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, query_dim=4, quorum=0.0)
    model = attach_memory(random_model().eval(), config)
    results = ResultCache()
    likelihoods(model, tiny_tokenizer, texts, results)
    teach(model, tiny_tokenizer, texts[0])
    assert likelihoods(model, tiny_tokenizer, texts, results) == likelihoods(model, tiny_tokenizer, texts)


@torch.no_grad()
@pytest.mark.parametrize("num_kept", [0, 2])
def test_what_has_no_room_runs_again(model, tiny_tokenizer, texts, num_kept):
    results = ResultCache()
    likelihoods(model, tiny_tokenizer, texts[:num_kept], results)
    needed = sum(batch.num_bytes for batch in results.batches.values())
    results = ResultCache(max_bytes=needed)
    expected = likelihoods(model, tiny_tokenizer, texts[:4], results)
    assert (len(results.batches), results.free_bytes) == (num_kept, 0)
    with counted(model) as passes:
        assert likelihoods(model, tiny_tokenizer, texts[:4], results) == expected
    assert len(passes) == 4 - num_kept


@torch.no_grad()
def test_it_can_be_kept_in_a_file(model, tiny_tokenizer, texts, tmp_path):
    results = ResultCache()
    before = likelihoods(model, tiny_tokenizer, texts, results), answers(model, tiny_tokenizer, results)
    results.save(tmp_path / "folder" / "results.pt")
    loaded = ResultCache.load(tmp_path / "folder" / "results.pt")
    assert loaded.free_bytes == results.free_bytes
    with counted(model) as passes:
        assert before == (
            likelihoods(model, tiny_tokenizer, texts, loaded),
            answers(model, tiny_tokenizer, loaded),
        )
    assert not passes
    teach(model, tiny_tokenizer, texts[47])
    assert likelihoods(model, tiny_tokenizer, texts, loaded) == likelihoods(model, tiny_tokenizer, texts)
