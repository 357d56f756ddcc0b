import json

import pytest
import torch

from sparsemem.data import Fact
from sparsemem.errors import DataError
from sparsemem.memory.attach import observe_reads
from sparsemem.memory.checkpoint import load
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.study.entities import PLACES, SELECTIONS, entity_study, read_wordings

ZED = Fact(
    question="Who owns Zed Quz?", answer="Ana", subject="Zed Quz", id="zed",
    statement="Zed Quz is owned by Ana.", paraphrases=("Ana bought it.", "Ana has Zed Quz."),
)  # fmt: skip
RAX = Fact(question="Where is Rax?", answer="Rome", subject="Rax", id="rax", statement="Rax lies in Rome.")


@pytest.fixture
def parts(folder):
    model, tokenizer = load(folder)
    return model, tokenizer, load_usage(folder / USAGE_FILE)


def test_wordings_that_name_the_subject_are_read_without_their_padding(parts):
    model, tokenizer, _ = parts
    texts = ["Zed Quz is owned by Ana.", "Ana has Zed Quz.", "Who owns Zed Quz?"]
    read = read_wordings(model, tokenizer, ZED)
    assert len(read) == len(texts)
    for text, wording in zip(texts, read, strict=True):
        ids, alone = tokenizer(text)["input_ids"], []
        observe_reads(model, lambda _, reads, alone=alone: alone.append(reads), input_ids=torch.tensor([ids]))
        assert torch.equal(wording.slot_ids, alone[0].slot_ids[0].flatten(1))
        torch.testing.assert_close(wording.weights, alone[0].weights[0].flatten(1))


def test_every_token_has_its_place(parts):
    model, tokenizer, _ = parts
    statement = read_wordings(model, tokenizer, ZED)[0]
    offsets = tokenizer("Zed Quz is owned by Ana.", return_offsets_mapping=True)["offset_mapping"]
    names = [PLACES[place] for place in statement.places.tolist()]
    subject = [i for i, (left, _) in enumerate(offsets) if left < len("Zed Quz")]
    assert len(subject) > 2
    assert names[subject[0]] == "subject, first token"
    assert names[subject[-1]] == "subject, last token"
    assert {names[i] for i in subject[1:-1]} == {"subject, inside"}
    assert names[subject[-1] + 1] == "after subject"
    answer = [i for i, (left, right) in enumerate(offsets) if right > 20 and left < 23]
    assert {names[i] for i in answer} == {"answer"}
    assert names[-1] == "else"
    assert statement.is_subject.nonzero().squeeze(1).tolist() == subject


def test_shares_agree_with_counting(parts):
    model, tokenizer, usage = parts
    steps = []
    result = entity_study(
        model,
        tokenizer,
        usage,
        [ZED, RAX],
        top_ts=(4, 64),
        num_shifts=19,
        on_step=lambda *at: steps.append(at),
    )
    assert json.loads(json.dumps(result)) == result
    assert steps == [(1, 2), (2, 2)]
    assert (result["num_facts"], result["num_wordings"], result["reads_per_token"]) == (2, 5, 8)
    read = [read_wordings(model, tokenizer, fact) for fact in (ZED, RAX)]
    tokens = [torch.cat([w.is_subject for w in of_fact]).double().mean().item() for of_fact in read]
    # All slots that are read score under "random": its reads are all reads, which stand as the tokens do.
    everything = result["selections"]["random"]["64"]
    assert everything["share"]["mean"] == pytest.approx(sum(tokens) / 2)
    assert everything["above_chance"]["mean"] == pytest.approx(0)
    assert everything["by_place"] == pytest.approx(result["token_share"])
    assert set(result["selections"]) == set(SELECTIONS)
    for by_top_t in result["selections"].values():
        for found in by_top_t.values():
            assert 0 < found["p"] <= 1
            assert sum(found["by_place"].values()) == pytest.approx(1)


def test_the_core_set_is_read_in_every_wording(parts):
    model, tokenizer, usage = parts
    core = entity_study(model, tokenizer, usage, [ZED, RAX], top_ts=(4,), num_shifts=9)["core"]
    sizes = []
    for fact in (ZED, RAX):
        sets = [set(wording.slot_ids.flatten().tolist()) for wording in read_wordings(model, tokenizer, fact)]
        sizes.append(len(set.intersection(*sets)))
    assert (core["size"]["min"], core["size"]["max"]) == (min(sizes), max(sizes))
    assert core["size"]["mean"] == sum(sizes) / 2
    assert core["at_subject"]["max"] <= core["size"]["max"]


def test_names_of_a_tagger_are_asked_for_like_subjects(parts):
    model, tokenizer, usage = parts

    def tagger(texts):
        return [[(text.index("Zed"), text.index("Zed") + 7)] if "Zed" in text else [] for text in texts]

    read = read_wordings(model, tokenizer, ZED, tagger)
    assert all(torch.equal(wording.is_name, wording.is_subject) for wording in read)
    assert not any(wording.is_name.any() for wording in read_wordings(model, tokenizer, RAX, tagger))
    options = {"top_ts": (4, 64), "num_shifts": 19}
    with_names = entity_study(model, tokenizer, usage, [ZED], tagger=tagger, **options)["selections"]
    without = entity_study(model, tokenizer, usage, [ZED], **options)["selections"]
    for name, by_top_t in with_names.items():
        for top_t, found in by_top_t.items():
            names = found.pop("names")
            assert names == {key: found[key] for key in names}
            assert found == without[name][top_t]


@pytest.mark.parametrize(
    "fact",
    [
        Fact(question="Who?", answer="Ana", statement="Ana.", id="x"),
        Fact(question="Who?", answer="Ana", subject="Zed", statement="Zed is Ana's.", id="x"),
    ],
)
def test_a_fact_that_names_no_subject_is_refused(parts, fact):
    model, tokenizer, _ = parts
    with pytest.raises(DataError, match="x: fewer than two wordings name a subject"):
        read_wordings(model, tokenizer, fact)
