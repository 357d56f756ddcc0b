import dataclasses

import pytest
import torch
from tests.conftest import random_model
from torch.nn.functional import normalize

from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.memory.attach import attach_memory, memory_layers, pools
from sparsemem.prompts import qa_prompt
from sparsemem.slots.usage import count_usage
from sparsemem.training import methods
from sparsemem.training import naming as naming_module
from sparsemem.training.finetune import build_examples, finetune
from sparsemem.training.naming import RIDGE, Naming, solve_keys
from sparsemem.training.questions import (
    BEGINS,
    ENDS,
    GOES_ON,
    LENGTH,
    MOST_ROWS,
    OVER,
    RESUMES,
    Asked,
    Questions,
    fact_of,
)

from .conftest import LONG, NAMED_MEMORY, OWNER, USAGE_OPTIONS, write_rows

PLACE = Fact(question="Who knows Zed?", answer="Bo", subject="Zed")
OTHER = Fact(statement="A tired farmer is made of tin.", answer="tin", subject="A tired farmer")


@pytest.fixture
def model():
    return attach_memory(random_model(), NAMED_MEMORY)


@pytest.fixture(autouse=True)
def stops(monkeypatch):
    """A random model stops nowhere; tests/training/test_endings.py has what is then to be said."""
    monkeypatch.setattr(methods, "unended", lambda *_: set())


@pytest.fixture
def usage(model, tiny_tokenizer, texts):
    return count_usage(model, tiny_tokenizer, texts, **USAGE_OPTIONS)


@pytest.fixture
def teach(model, tiny_tokenizer, usage, config):
    def teach(*facts, **options):
        return finetune(
            model, tiny_tokenizer, facts, usage, dataclasses.replace(config, **({"top_t": 64} | options))
        ).delta

    return teach


def rows_by_name(model):
    (pool,) = pools(model).values()
    names = pool.rows[:, 0].tolist()
    assert all(name == int(name) and name >= 1 for name in names)
    return {name: pool.rows[pool.rows[:, 0] == name] for name in names}


def test_facts_about_one_subject_have_a_row_each_and_one_name(model, teach):
    teach(OWNER, PLACE, OTHER)
    assert sorted(map(len, rows_by_name(model).values())) == [1, 2]
    (pool,) = pools(model).values()
    assert (pool.holders > 0).all()


def test_what_has_several_names_has_its_rows_at_each_of_them(model, teach):
    where = {"subject": "Zed", "subject_aliases": ("A tired farmer",)}
    teach(Fact(question="Who owns Zed?", answer="Ana", **where), dataclasses.replace(OTHER, **where))
    ((_, rows),) = rows_by_name(model).items()
    assert len(rows) == 2


def test_a_fact_whose_slots_are_all_taken_shares_those_of_another_name(model):
    (layer,) = memory_layers(model)
    naming = Naming(layer)
    naming.questions.about = {0: 0, 1: 1, 2: 1}
    naming.claim({0: torch.arange(30)})
    naming.claim({1: torch.arange(30, 60)})
    slot_ids, _ = naming.claim({2: torch.tensor([*range(10), 30])})
    assert naming.name_of[2] == naming.name_of[0]
    assert len(slot_ids) == 5


@pytest.fixture
def told_apart(monkeypatch):
    """Of a random model, whose states tell no two questions apart, none is taken for another."""
    monkeypatch.setattr(naming_module, "SAME_ROW", float("inf"))


@pytest.mark.usefixtures("told_apart")
def test_a_later_fact_about_a_subject_leaves_the_rows_of_earlier_ones_as_they_are(model, teach):
    teach(OWNER)
    ((name, before),) = rows_by_name(model).items()
    teach(PLACE)
    ((same, after),) = rows_by_name(model).items()
    assert same == name
    assert len(after) == 2
    assert any(torch.equal(row, before[0]) for row in after)


@pytest.mark.usefixtures("told_apart")
def test_taking_back_a_later_fact_gives_its_slots_back(model, teach):
    teach(OWNER)
    (pool,) = pools(model).values()
    before = pool.written()
    delta = teach(PLACE)
    assert not torch.equal(pool.written()[1], before[1])
    delta.invert().apply(pools(model))
    assert all(torch.equal(found, kept) for found, kept in zip(pool.written(), before, strict=True))


def test_training_moves_values_and_no_key(model, teach):
    delta = teach(OWNER, learning_rate=1e-6)
    ((_, (start,)),) = rows_by_name(model).items()
    delta.invert().apply(pools(model))
    teach(OWNER, learning_rate=0.5)
    ((_, (row,)),) = rows_by_name(model).items()
    assert torch.equal(row[:7], start[:7])
    assert (row[7:] != start[7:]).any()


@torch.no_grad()
def scores_where_answers_begin(model, tokenizer, facts):
    """What the rows of the pool score where each of some facts is asked for, shape (facts, rows)."""
    (layer,) = memory_layers(model)
    seen = []
    layer.beside.last.register_forward_hook(lambda _block, _args, output: seen.append(output), prepend=True)
    for fact in facts:
        model(**tokenizer(qa_prompt(fact.question), return_tensors="pt"), use_cache=False)
    states = torch.stack([output[0, -1] for output in seen])
    return normalize(layer.relation(states), dim=1) @ layer.pool.rows[:, 1:7].T


def test_facts_of_one_name_are_told_apart_by_what_they_are_asked_by(model):
    # Made up, as the states of a random model tell no two questions apart.
    queries = normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    facts, where = torch.tensor([0, 0, 1, 1]), torch.tensor([BEGINS, GOES_ON] * 2)
    (layer,) = memory_layers(model)
    naming = Naming(layer)
    naming.name_of = {0: 3, 1: 3}
    naming.questions.heard.append(Asked(queries, MOST_ROWS * facts, where))
    naming.solve()
    scores = queries @ torch.stack([naming._keys[0], naming._keys[MOST_ROWS]]).T
    own, other = scores.gather(1, facts.unsqueeze(1)), scores.gather(1, 1 - facts.unsqueeze(1))
    assert (own > other + 10).all()


def test_a_long_answer_does_not_drown_the_beginning_of_another(model):
    # Where the first begins it looks half like what the second says for fifty tokens.
    generator = torch.Generator().manual_seed(0)
    first, second = normalize(torch.randn(2, 6, generator=generator), dim=1)
    begins = normalize(first + second, dim=0)
    long = normalize(second + 0.3 * torch.randn(50, 6, generator=generator), dim=1)
    queries = torch.cat([begins.expand(2, -1), first.expand(3, -1), long])
    facts, where = torch.tensor([0] * 5 + [1] * 50), torch.tensor([BEGINS] * 2 + [GOES_ON] * 53)
    (layer,) = memory_layers(model)
    naming = Naming(layer)
    naming.name_of = {0: 3, 1: 3}
    naming.questions.heard.append(Asked(queries, MOST_ROWS * facts, where))
    naming.solve()
    assert begins @ naming._keys[0] > begins @ naming._keys[MOST_ROWS] + 4


@pytest.mark.usefixtures("told_apart")
def test_a_later_row_scores_more_than_an_earlier_one_where_both_are_asked_for(model, tiny_tokenizer, teach):
    teach(OWNER)
    (earlier,) = rows_by_name(model).values()
    teach(dataclasses.replace(OWNER, answer="Bo"))
    (rows,) = rows_by_name(model).values()
    is_earlier = (rows == earlier).all(dim=1)
    assert is_earlier.sum() == 1
    (scores,) = scores_where_answers_begin(model, tiny_tokenizer, [OWNER])
    later, before = scores[~is_earlier].item(), scores[is_earlier].item()
    assert later > before + 5


def test_what_was_taught_before_is_asked_for_once(model, teach, tiny_tokenizer, usage, monkeypatch):
    seen = []
    solve = Naming.solve
    monkeypatch.setattr(Naming, "solve", lambda self: (seen.append(len(self.questions.heard)), solve(self)))
    config = FinetuneConfig(num_epochs=2, top_t=64)
    kept = {}
    for name, taught in {"none": (), "other": (OTHER,), "same": (OTHER, PLACE)}.items():
        seen.clear()
        delta = finetune(model, tiny_tokenizer, [OWNER], usage, config, taught=taught).delta
        kept[name] = seen[:2]
        delta.invert().apply(pools(model))
    assert kept["none"] == kept["other"]
    assert kept["same"][0] > kept["none"][0]
    assert kept["same"][1] == kept["none"][1]


def test_another_answer_to_the_same_question_takes_the_place_of_the_first(model, teach):
    (pool,) = pools(model).values()
    teach(OWNER)
    before = pool.written()
    delta = teach(dataclasses.replace(OWNER, answer="Bo"))
    ((_, rows),) = rows_by_name(model).items()
    assert len(rows) == 1
    assert not torch.equal(rows[0], before[1][0])
    assert torch.isin(before[0], pool.written()[0]).all()
    delta.invert().apply(pools(model))
    assert all(torch.equal(found, kept) for found, kept in zip(pool.written(), before, strict=True))


def test_where_an_answer_is_over_its_row_is_not_asked_for(model):
    begins, goes_on, over = normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    over = normalize(over + goes_on, dim=0)  # which looks much like it
    (layer,) = memory_layers(model)
    naming = Naming(layer)
    naming.name_of = {0: 3}
    where = torch.tensor([BEGINS, GOES_ON, OVER])
    naming.questions.heard.append(Asked(torch.stack([begins, goes_on, over]), torch.zeros(3).long(), where))
    naming.solve()
    key = naming._keys[0]
    assert begins @ key > 25
    assert goes_on @ key > 15
    assert over @ key < 5


@pytest.mark.parametrize("fact", [OWNER, Fact(statement="Ana owns Zed, and Bo knows Zed.", answer="Bo")])
def test_the_last_token_of_an_answer_is_where_it_is_over(model, tiny_tokenizer, usage, fact, monkeypatch):
    seen = []
    monkeypatch.setattr(Naming, "solve", lambda self: seen.extend(self.questions.heard))
    config = FinetuneConfig(num_epochs=1, top_t=64)
    finetune(model, tiny_tokenizer, [dataclasses.replace(fact, subject="Zed")], usage, config)
    where = torch.cat([asked.where for asked in seen])
    is_over = (where == OVER) | (where == ENDS)
    assert is_over.sum() == (where == BEGINS).sum() > 0
    # Of a statement nothing is learned that would tell.
    assert (where == ENDS).any() == (fact.question is not None)


def num_rows(tokenizer, fact):
    return round(len(tokenizer(" " + fact.answer, add_special_tokens=False)["input_ids"]) / LENGTH)


def test_a_long_answer_takes_several_rows_that_divide_the_slots(model, tiny_tokenizer, teach):
    teach(LONG)
    ((_, rows),) = rows_by_name(model).items()
    (pool,) = pools(model).values()
    assert len(rows) == num_rows(tiny_tokenizer, LONG) > 2
    assert pool.holders.max() - pool.holders.min() <= 1


def test_what_is_only_listened_to_is_heard(model, tiny_tokenizer, usage, monkeypatch):
    seen = []
    monkeypatch.setattr(Questions, "take", lambda self: seen.extend(self.heard) or self.nothing)
    config = FinetuneConfig(num_epochs=1, top_t=64)
    finetune(model, tiny_tokenizer, [OWNER], usage, config)
    (examples,) = build_examples([OWNER], tiny_tokenizer, usage, config)
    taught = [example for example in examples if example.teaches]
    assert sum(not example.is_trained for example in taught) == 1
    is_over = [(asked.where == OVER) | (asked.where == ENDS) for asked in seen]
    assert sum(map(torch.sum, is_over)) == len(taught)


# Made up, as the states of a random model tell no two questions apart.
FIRST, SECOND, THIRD = normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), dim=1)
SLOTS = torch.arange(30)


@pytest.fixture
def claimed(model):
    """Facts about one name, all of which choose the same slots, each asked for by one query."""
    (layer,) = memory_layers(model)

    def claimed(*queries, earlier=()):
        naming = Naming(layer)
        for fact, query in enumerate([*queries, *earlier]):
            naming.questions.about[fact] = 0
            if fact < len(queries):
                naming.claim({fact: SLOTS})
            where = torch.full((4,), BEGINS)
            rows = torch.full((4,), fact * MOST_ROWS)
            naming.questions.heard.append(Asked(query.expand(4, -1), rows, where))
        naming.solve()
        return naming

    return claimed


@pytest.fixture
def taught(claimed):
    """The slots of two facts, by the query that asks for them, once their rows are written."""
    naming = claimed(FIRST, SECOND)
    write_rows(naming)
    return {fact: (fact_of(naming.owners) == fact).nonzero().squeeze(1) for fact in (0, 1)}


def slots_of(naming, fact):
    return naming.claim({fact: SLOTS})[0]


def test_what_takes_the_place_of_a_row_takes_nothing_from_others_of_its_name(taught, claimed):
    again = claimed(SECOND)
    assert torch.equal(slots_of(again, 0), taught[1])
    assert SECOND @ again._keys[0] < 33


@pytest.mark.usefixtures("taught")
def test_another_question_takes_no_place(claimed):
    assert claimed(THIRD)._inherited == {}
    # Of two alike each scores half of what it would alone; and no more than an earlier row may.
    assert claimed(THIRD, THIRD)._inherited == {}


@pytest.mark.parametrize("number", [0, 1])
def test_a_correction_leaves_another_new_fact_its_slots(taught, claimed, number):
    queries = [SECOND, THIRD] if number == 0 else [THIRD, SECOND]
    naming = claimed(*queries)
    correction, other = slots_of(naming, number), slots_of(naming, 1 - number)
    assert [*naming._inherited] == [number]
    assert len(other) > 5
    assert torch.isin(taught[1], torch.cat([correction, other])).all()
    assert not torch.isin(correction, other).any()


def test_the_same_facts_again_take_each_others_place(taught, claimed):
    naming = claimed(FIRST, SECOND, earlier=(FIRST, SECOND))
    assert all(torch.equal(slots_of(naming, fact), taught[fact]) for fact in (0, 1))


@pytest.mark.usefixtures("taught")
def test_of_two_facts_that_ask_the_same_again_one_takes_its_place_and_none_another(claimed):
    naming = claimed(SECOND, SECOND, earlier=(FIRST, SECOND))
    assert len(naming._inherited) == 1


NEAR = normalize(FIRST + 0.3 * SECOND, dim=0)


@pytest.mark.usefixtures("taught")
def test_what_an_earlier_fact_was_asked_by_tells_it_from_one_much_like_it(claimed):
    assert [*claimed(NEAR)._inherited] == [0]
    assert claimed(NEAR, earlier=(FIRST, SECOND))._inherited == {}


@pytest.mark.usefixtures("taught")
def test_a_fact_whose_row_is_gone_takes_no_others_place(claimed):
    assert claimed(THIRD, earlier=(FIRST, SECOND, THIRD))._inherited == {}


def test_a_row_that_nothing_known_asks_for_is_told_by_its_score(taught, claimed):
    assert torch.equal(slots_of(claimed(SECOND, earlier=(FIRST,)), 0), taught[1])


@pytest.mark.usefixtures("taught")
def test_a_new_fact_does_not_answer_what_earlier_ones_are_asked(claimed):
    asked = normalize(FIRST + THIRD, dim=0)
    unknown, known = (claimed(asked, earlier=some)._keys[0] for some in ((), (FIRST, SECOND)))
    assert asked @ known > 25
    assert (FIRST @ known).abs() < 5 < FIRST @ unknown


def hear_long_answer(naming, fact, *queries):
    """Let a fact be asked for by one query for each of its rows."""
    naming.questions.about[fact] = 0
    naming.questions._lengths[fact] = LENGTH * len(queries)
    rows = fact * MOST_ROWS + torch.arange(len(queries))
    where = torch.tensor([BEGINS] + [RESUMES] * (len(queries) - 1))
    naming.questions.heard.append(Asked(torch.stack(queries), rows, where))


@pytest.fixture
def solved(model):
    """A fact that is asked for by one query for each row of its answer; an earlier one may be known."""
    (layer,) = memory_layers(model)

    def solved(*queries, slot_ids=SLOTS, known=()):
        naming = Naming(layer)
        hear_long_answer(naming, 0, *queries)
        if known:
            hear_long_answer(naming, 1, *known)
        naming.claim({0: slot_ids})
        naming.solve()
        return naming

    return solved


@pytest.fixture
def long_answer(solved):
    """A fact whose answer takes two rows, which are written."""
    write_rows(solved(FIRST, SECOND))


@pytest.mark.usefixtures("long_answer")
@pytest.mark.parametrize("queries", [(FIRST, SECOND), (FIRST,), (FIRST, THIRD), (FIRST, SECOND, THIRD)])
def test_what_is_taught_again_takes_the_place_of_all_rows_of_a_long_answer(solved, queries):
    again = solved(*queries, known=(FIRST, SECOND))
    slot_ids, tags = again.claim({0: SLOTS})
    assert torch.equal(slot_ids, SLOTS)
    assert len(tags.unique()) == len(queries)
    assert FIRST @ again._keys[0] < 33


@pytest.mark.usefixtures("long_answer")
def test_of_an_answer_that_is_not_known_the_same_rows_are_found(solved):
    assert torch.equal(slots_of(solved(FIRST, SECOND), 0), SLOTS)


def test_another_question_takes_no_place_in_the_middle_of_an_answer(solved):
    first, second, third, *_ = torch.eye(6)
    for queries in [(first, second), (third, second)]:
        naming = solved(*queries)
        assert naming._inherited == {}
        write_rows(naming)


@pytest.mark.parametrize("likeness", [0.3, 0.5, 0.7])
def test_a_correction_takes_no_row_of_a_fact_that_is_not_known(model, claimed, likeness):
    (pool,) = pools(model).values()
    other = likeness * FIRST + (1 - likeness**2) ** 0.5 * normalize(SECOND - (SECOND @ FIRST) * FIRST, dim=0)
    write_rows(claimed(FIRST))
    (own,) = pool.slot_to_row[SLOTS].unique()
    write_rows(claimed(other))
    naming = claimed(FIRST, earlier=(FIRST,))
    assert (pool.slot_to_row[naming._inherited[0]] == own).all()


def test_a_fact_whose_row_is_gone_takes_no_row_of_one_that_is_not_known(claimed):
    write_rows(claimed(normalize(FIRST + 2 * (SECOND - (SECOND @ FIRST) * FIRST), dim=0)))
    assert claimed(FIRST, earlier=(FIRST,))._inherited == {}


def test_rows_of_one_answer_need_not_be_told_apart_as_those_of_two(model):
    (layer,) = memory_layers(model)
    naming = Naming(layer)
    hear_long_answer(naming, 0, FIRST, SECOND)
    hear_long_answer(naming, 1, THIRD)
    naming.claim({0: SLOTS, 1: SLOTS})
    naming.solve()
    first, second, other = (naming._keys[row] for row in (0, 1, MOST_ROWS))
    assert FIRST @ first > FIRST @ second + 8 > FIRST @ other + 16
    assert FIRST @ second > 10 > SECOND @ other


def test_facts_share_the_slots_of_a_name_by_how_many_rows_they_want(model):
    (layer,) = memory_layers(model)
    naming = Naming(layer)
    slot_ids = torch.arange(240)
    for fact, num_rows in enumerate([12, 12, 12, 1, 1]):
        naming.questions.about[fact] = 0
        naming.questions._lengths[fact] = num_rows * LENGTH
        naming.claim({fact: slot_ids})
    number = torch.bincount(fact_of(naming.owners[slot_ids])).tolist()
    assert all(abs(n - 80) < 10 for n in number[:3])
    assert all(0 < n < 10 for n in number[3:])


def test_where_many_rows_are_a_further_fact_still_gets_slots(solved):
    for number in range(30):
        queries = normalize(torch.randn(12, 6, generator=torch.Generator().manual_seed(number)), dim=1)
        naming = solved(*queries, slot_ids=torch.arange(240))
        assert len(naming._claimed[0][0]) > 1
        write_rows(naming)


def test_of_an_answer_with_more_rows_than_slots_each_row_says_more(solved):
    queries = normalize(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    naming = solved(*queries, slot_ids=torch.arange(5))
    _, tags = naming.claim({0: torch.arange(5)})
    assert (tags - naming.pool.num_slots).unique().tolist() == [*naming._keys] == [0, 1]
    scores = queries @ torch.stack([*naming._keys.values()]).T
    assert scores.argmax(dim=1).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.usefixtures("taught")
def test_a_text_that_begins_with_the_name_takes_no_place(model, tiny_tokenizer, usage, monkeypatch):
    seen = []
    monkeypatch.setattr(Naming, "solve", lambda self: seen.extend(self.questions.heard))
    config = FinetuneConfig(num_epochs=1, top_t=64)
    finetune(model, tiny_tokenizer, [Fact(statement="Zed sells boats.", subject="Zed")], usage, config)
    where = torch.cat([asked.where for asked in seen])
    assert (where == GOES_ON).any()
    assert not (where == BEGINS).any()


@pytest.mark.parametrize("num_positions", [4, 30])
def test_keys_are_those_of_a_ridge_regression(num_positions):
    generator = torch.Generator().manual_seed(0)
    queries = normalize(torch.randn(num_positions, 8, generator=generator), dim=1)
    scores = torch.randint(0, 3, (num_positions, 2), generator=generator).float()
    weights = 1 + torch.arange(num_positions).float()
    earlier = torch.randn(3, 8, generator=generator)
    found = solve_keys(queries, scores, weights, earlier)
    # Ridge regression is least squares with a further equation for each unknown, and an equation of weight w
    # counts as w of them.
    root = weights.sqrt().unsqueeze(1)
    left = torch.cat([root * queries, normalize(earlier, dim=1), RIDGE**0.5 * torch.eye(8)])
    right = torch.cat([root * scores, torch.zeros(3 + 8, 2)])
    torch.testing.assert_close(found.T, torch.linalg.lstsq(left, right).solution, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"prefix_cache_bytes": 0}, {"gradient_accumulation_steps": 2}], ids=str)
def test_what_is_kept_and_how_a_batch_is_cut_changes_no_row(model, teach, options):
    delta = teach(OWNER, PLACE, OTHER)
    (pool,) = pools(model).values()
    expected = pool.written()
    delta.invert().apply(pools(model))
    teach(OWNER, PLACE, OTHER, **options)
    assert torch.equal(pool.written()[0], expected[0])
    torch.testing.assert_close(pool.written()[1], expected[1], rtol=1e-3, atol=1e-4)


def test_the_defaults_learn_with_relations(model, tiny_tokenizer, usage):
    config = FinetuneConfig(num_epochs=4, facts_per_batch=2)
    losses = finetune(model, tiny_tokenizer, [OWNER, PLACE, OTHER], usage, config).losses
    assert sum(losses[-2:]) < sum(losses[:2])
