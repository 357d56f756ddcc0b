import dataclasses

import pytest
import torch
from tests.conftest import random_model
from torch.nn.functional import normalize, one_hot

from sparsemem.data import Fact
from sparsemem.likelihood import log_probs_at
from sparsemem.memory.attach import attach_memory, memory_layers, pools
from sparsemem.slots.usage import count_usage
from sparsemem.training import endings, methods
from sparsemem.training.endings import unended
from sparsemem.training.finetune import build_examples, finetune
from sparsemem.training.naming import Naming
from sparsemem.training.questions import (
    BEGINS,
    END,
    ENDS,
    LENGTH,
    MOST_ROWS,
    RESUMES,
    Asked,
)

from .conftest import NAMED_MEMORY, OWNER, USAGE_OPTIONS, write_rows

STATEMENT = Fact(statement="A tired farmer is made of tin.", answer="tin", subject="A tired farmer")
FIRST, OVER_FIRST, SECOND, OVER_SECOND = normalize(
    torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1
)
SLOTS = torch.arange(30)


@pytest.fixture
def model():
    return attach_memory(random_model(), NAMED_MEMORY)


@pytest.fixture
def usage(model, tiny_tokenizer, texts):
    return count_usage(model, tiny_tokenizer, texts, **USAGE_OPTIONS)


@pytest.fixture
def examples(tiny_tokenizer, config):
    other = Fact(question="Who knows Quz?", answer="Bo and Carl", subject="Quz")
    whole = dataclasses.replace(config, max_length=512)
    by_fact = build_examples([OWNER, other, STATEMENT], tiny_tokenizer, None, whole)
    return [example for of_fact in by_fact for example in of_fact]


def test_where_the_model_would_go_on_an_answer_is_unended(model, tiny_tokenizer, examples, monkeypatch):
    seen = []

    def predict(model, input_ids, attention_mask, positions):
        """Stop after the answer to the first fact, and nowhere else."""
        assert torch.equal(positions.sum(dim=1), torch.ones(len(positions)).long())
        log_probs = log_probs_at(model, input_ids, attention_mask, positions)
        stops = input_ids.roll(-1, dims=1)[positions]
        seen.extend(stops.tolist())
        goes_on = torch.arange(len(stops)) > 0
        return one_hot((stops + goes_on) % log_probs.shape[1], log_probs.shape[1])

    monkeypatch.setattr(endings, "log_probs_at", predict)
    assert unended(model, tiny_tokenizer, examples) == {1}
    assert len(seen) == 2  # one text of each, and none of a statement, which tells nothing
    assert len(set(seen)) == 1


def test_the_text_behind_several_answered_examples_tells(model, tiny_tokenizer, examples, monkeypatch):
    told = []
    collate_passes = endings.collate_passes
    monkeypatch.setattr(
        endings, "collate_passes", lambda texts, device: told.extend(texts) or collate_passes(texts, device)
    )
    unended(model, tiny_tokenizer, examples)
    assert [text.is_trained for text in told] == [False, False]
    told.clear()
    unended(model, tiny_tokenizer, [example for example in examples if example.is_trained])
    assert [text.fact_index for text in told] == [0, 1]
    assert unended(model, tiny_tokenizer, [example for example in examples if not example.says_end]) == set()


def test_two_ends_of_lines_in_one_token_end_an_answer_too(model, examples, monkeypatch):
    """Of Gemma, which has one token for both."""

    class Merging:
        eos_token_id = 7
        texts = {8: "\n\n", 9: "-sur"}

        def decode(self, tokens):
            return self.texts.get(tokens[0], "\n")

    for predicted, goes_on in {7: set(), 8: set(), 9: {0, 1}}.items():
        monkeypatch.setattr(
            endings, "log_probs_at", lambda *args, p=predicted: one_hot(torch.full((len(args[3]),), p), 300)
        )
        assert unended(model, Merging(), examples) == goes_on


def test_a_model_that_stops_is_told_from_one_that_goes_on(model, tiny_tokenizer, examples):
    ending = next(e.labels[e.over + 1] for e in examples if e.says_end)
    head = model.get_output_embeddings()
    say = {token: torch.eye(300)[token] for token in (ending, ending + 1)}
    for token, goes_on in {ending: set(), ending + 1: {0, 1}}.items():
        handle = head.register_forward_hook(lambda _head, _args, out, t=token: say[t].expand_as(out))
        assert unended(model, tiny_tokenizer, examples) == goes_on
        handle.remove()


@pytest.fixture
def naming(model):
    """A fact that is asked for by one query, and whose answer another follows."""
    (layer,) = memory_layers(model)

    def naming(*asked, unended=(), slot_ids=SLOTS, known=()):
        naming = Naming(layer)
        naming.questions.unended = set(unended)
        for fact, (*begins, ends) in enumerate(filter(None, [asked, known])):
            says = [query for query in begins if query is not None]
            naming.questions.about[fact] = 0
            naming.questions._lengths[fact] = LENGTH * len(begins)
            rows = fact * MOST_ROWS + torch.tensor([*range(len(says)), *[max(0, len(says) - 1)] * 3])
            where = torch.tensor([*[BEGINS, *[RESUMES] * 9][: len(says)], ENDS, ENDS, ENDS])
            naming.questions.heard.append(Asked(torch.stack([*says, ends, ends, ends]), rows, where))
        naming.claim({0: slot_ids})
        naming.solve()
        return naming

    return naming


def test_a_row_of_its_own_says_that_an_answer_is_over(naming):
    keys = naming(FIRST, OVER_FIRST, unended={0})._keys
    assert [*keys] == [0, END]
    assert FIRST @ keys[0] > 25 > 3 > abs(FIRST @ keys[END])
    assert OVER_FIRST @ keys[END] > 25 > 3 > abs(OVER_FIRST @ keys[0])


def test_where_the_model_stops_by_itself_no_row_says_so(naming):
    keys = naming(FIRST, OVER_FIRST)._keys
    assert [*keys] == [0]
    assert abs(OVER_FIRST @ keys[0]) < 3


def test_both_rows_share_the_slots_of_the_fact(naming):
    found = naming(FIRST, OVER_FIRST, unended={0})
    slot_ids, tags = found.claim({0: SLOTS})
    assert torch.equal(slot_ids, SLOTS)
    assert (tags - found.pool.num_slots).unique(return_counts=True)[1].tolist() == [15, 15]


def test_with_too_few_slots_for_both_the_answer_is_said(naming):
    found = naming(FIRST, OVER_FIRST, unended={0}, slot_ids=SLOTS[:3])
    assert [*found._keys] == [0]
    assert abs(OVER_FIRST @ found._keys[0]) < 3


def test_of_a_long_answer_with_few_slots_the_end_is_one_row(naming):
    queries = normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    found = naming(*queries, unended={0}, slot_ids=SLOTS[:6])
    assert [*found._keys] == [0, 1, END]
    assert found.owners[SLOTS[:6]].tolist() == [0, 1, END, 0, 1, END]
    scores = queries @ torch.stack([*found._keys.values()]).T
    assert scores.argmax(dim=1).tolist() == [0, 0, 1, 1, 2]


def test_of_what_is_only_over_no_row_says_anything(naming):
    found = naming(None, OVER_FIRST, unended={0}, slot_ids=SLOTS[:1])
    assert [*found._keys] == [0]
    assert abs(OVER_FIRST @ found._keys[0]) < 3


def test_what_is_taught_again_still_ends(naming):
    # By then the model stops where the answer is over, for the row that the new ones take the place of.
    write_rows(naming(FIRST, OVER_FIRST, unended={0}))
    again = naming(FIRST, OVER_SECOND, known=(FIRST, OVER_FIRST))
    assert [*again._keys] == [0, END]
    assert torch.equal(again.claim({0: SLOTS})[0], SLOTS)
    assert OVER_SECOND @ again._keys[END] > 25


def test_another_fact_of_the_name_takes_no_end_of_it(naming):
    write_rows(naming(FIRST, OVER_FIRST, unended={0}))
    other = naming(SECOND, OVER_SECOND, known=(FIRST, OVER_FIRST))
    assert [*other._keys] == [0]
    assert abs(OVER_FIRST @ other._keys[0]) < 3
    assert len(other.claim({0: SLOTS})[0]) < len(SLOTS)


def test_without_history_the_end_of_what_is_corrected_stays(naming):
    write_rows(naming(FIRST, OVER_FIRST, unended={0}))
    again = naming(FIRST, OVER_SECOND)
    assert [*again._keys] == [0]
    taken = again.claim({0: SLOTS})[0]
    assert torch.equal(again._inherited[0], taken)
    assert len(taken) == len(SLOTS) / 2


def test_without_history_the_same_again_takes_both_rows(naming):
    write_rows(naming(FIRST, OVER_FIRST, unended={0}))
    again = naming(FIRST, OVER_FIRST, unended={0})
    assert torch.equal(again._inherited[0], SLOTS)


def test_what_a_stream_taught_is_known_with_its_end(naming):
    first = naming(FIRST, OVER_FIRST, unended={0})
    assert [*first._earlier.starts()] == [0, END]
    assert [*naming(FIRST, OVER_FIRST)._earlier.starts()] == [0]


def test_it_is_learned_that_an_answer_is_over(model, tiny_tokenizer, usage, config, monkeypatch):
    config = dataclasses.replace(config, top_t=64, num_epochs=8)
    losses = {}
    for stops in (False, True):
        monkeypatch.setattr(methods, "unended", lambda *_, stops=stops: set() if stops else {0})
        result = finetune(model, tiny_tokenizer, [OWNER], usage, config)
        (pool,) = pools(model).values()
        assert pool.num_rows == (1 if stops else 2)
        losses[stops] = result.losses[-1]
        result.delta.invert().apply(pools(model))
    assert losses[False] < losses[True]
