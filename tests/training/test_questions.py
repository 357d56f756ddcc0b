import dataclasses

import pytest
import torch
from tests.conftest import random_model

from sparsemem.likelihood import IGNORE
from sparsemem.memory.attach import attach_memory, memory_layers
from sparsemem.training.examples import collate
from sparsemem.training.finetune import build_examples
from sparsemem.training.questions import BEGINS, ENDS, LENGTH, MOST_ROWS, NOWHERE, OVER, RESUMES, Questions

from .conftest import LONG, NAMED_MEMORY, OWNER


@pytest.fixture
def model():
    return attach_memory(random_model(), NAMED_MEMORY)


@pytest.fixture
def questions(model):
    (layer,) = memory_layers(model)
    return Questions(layer)


def test_what_tells_that_an_answer_is_over_is_no_part_of_it(tiny_tokenizer, config):
    (examples,) = build_examples([OWNER], tiny_tokenizer, None, config)
    length = len(tiny_tokenizer(" Ana", add_special_tokens=False)["input_ids"])
    assert max(e.num_said for e in examples if e.teaches) == length
    assert max(e.num_labels for e in examples if e.teaches) > length


@torch.no_grad()
def test_each_row_is_asked_for_where_its_part_is_to_be_said(model, questions, tiny_tokenizer, config):
    examples = [e for e in build_examples([LONG], tiny_tokenizer, None, config)[0] if e.teaches]
    questions.introduce(examples)
    part = collate(examples)
    with questions.asked_in(part):
        model(part.input_ids, attention_mask=part.attention_mask, use_cache=False)
    asked = questions.take()
    said = asked.at(asked.where != OVER)
    num_rows = questions.num_rows(0)
    assert said.rows.unique().tolist() == [*range(num_rows)]
    assert torch.bincount(said.rows).max() <= len(examples) * 1.5 * LENGTH
    assert asked.at(asked.where == BEGINS).rows.unique().tolist() == [0]
    assert asked.at(asked.where == RESUMES).rows.unique().tolist() == [*range(1, num_rows)]
    assert asked.at(asked.where == OVER).rows.unique().tolist() == [num_rows - 1]
    assert [*asked.starts()] == [*range(num_rows)]


def test_an_answer_that_is_hardly_longer_than_a_row_says_has_one(questions):
    for length, num_rows in {1: 1, LENGTH: 1, LENGTH + 2: 1, LENGTH + 3: 2, 30: 6, 10_000: 255}.items():
        questions._lengths[0] = length
        assert questions.num_rows(0) == num_rows
        assert questions.num_rows(1) == 1
    questions.unended.add(0)
    assert questions.num_rows(0) == MOST_ROWS


def test_what_follows_the_end_of_an_answer_asks_for_its_last_row(questions, tiny_tokenizer, config):
    examples = [e for e in build_examples([LONG], tiny_tokenizer, None, config)[0] if e.teaches]
    short = [dataclasses.replace(e, over=e.over - 7) for e in examples]
    questions.introduce(short)
    rows, where = questions._places(collate(short))
    assert rows[where >= 0].max() == questions.num_rows(0) - 1


def test_what_is_left_out_of_an_answer_counts(questions, tiny_tokenizer, config):
    # Where the subject stands in the answer nothing before it is learned, unless it is named before.
    fact = dataclasses.replace(
        OWNER, answer="that is old Zed of the mill", paraphrases=("About Zed: that is old Zed of the mill.",)
    )
    (examples,) = build_examples([fact], tiny_tokenizer, None, config)
    (whole,) = (e for e in examples if "About" in tiny_tokenizer.decode(e.input_ids) and not e.num_left_out)
    begins = next(place for place, label in enumerate(whole.labels) if label != IGNORE)
    marks = tuple(place > begins and is_named for place, is_named in enumerate(whole.is_subject))
    cut = dataclasses.replace(whole, is_subject=marks).after_subject()
    assert whole.num_said == cut.num_left_out + cut.num_said > cut.num_said > 0
    questions.introduce([whole, cut])
    rows, where = questions._places(collate([whole, cut]))
    both = (where != NOWHERE).all(dim=0)
    assert both.any()
    assert torch.equal(rows[0, both], rows[1, both])
    assert not (where[1] == BEGINS).any()


def test_an_answer_begins_once(questions, tiny_tokenizer, config):
    (example, *_) = build_examples([OWNER], tiny_tokenizer, None, config)[0]
    first = next(place for place, label in enumerate(example.labels) if label != IGNORE)
    short = dataclasses.replace(example, over=first)  # with an ending of several tokens
    assert short.num_labels > short.num_said + 1 == 2
    questions.introduce([short])
    _, where = questions._places(collate([short]))
    assert (where == BEGINS).sum() == (where == ENDS).sum() == 1
    assert not (where == OVER).any()
