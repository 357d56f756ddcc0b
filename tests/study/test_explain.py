import dataclasses
import json

import pytest
import torch
from tests.study.conftest import SHAPE

from sparsemem.config import MemoryConfig, to_json
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, MissingFileError
from sparsemem.memory.attach import attach_memory, observe_reads, pools
from sparsemem.memory.delta import DeltaRecorder
from sparsemem.slots.usage import USAGE_FILE, count_usage, load_usage
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load
from sparsemem.study.explain import explain, explain_folder, taught_updates
from sparsemem.study.learn import learn
from sparsemem.study.reads import FIRES_FROM, Taught

pytestmark = pytest.mark.usefixtures("every_state_asks")

ZED = Fact(question="Who owns Zed?", answer="Ana", subject="Zed")
QUZ = Fact(statement="Quz is made of tin.", answer="tin", subject="Quz")


@pytest.fixture
def parts(folder):
    """A model that has learned nothing yet, its tokenizer and its usage."""
    model, tokenizer = load(folder)
    return model, tokenizer, load_usage(folder / USAGE_FILE)


def slots_read(model, tokenizer, text):
    found = []
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    observe_reads(model, lambda _, reads: found.append(reads.slot_ids), input_ids=ids)
    return found[0].unique()


def write(model, slot_ids, seed, name, facts=()):
    """Make an update by hand: random rows, one for all slots."""
    recorder = DeltaRecorder(pools(model))
    recorder.record("layer_1", slot_ids)
    pool = pools(model)["layer_1"]
    row = torch.randn(1, pool.value_dim, generator=torch.Generator().manual_seed(seed))
    row[0, 0] = 1 + seed  # the name it belongs to
    pool.write(slot_ids, row.expand(len(slot_ids), -1))
    return Taught(name, f"update {name}", tuple(facts), recorder.delta())


@torch.no_grad()
def next_log_probs(model, tokenizer, text):
    return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].log_softmax(dim=-1)


def bits(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {**tensors, "slot_to_row": pools(model)["layer_1"].slot_to_row.clone()}


def test_tokens_make_up_the_text_and_say_what_they_read(parts):
    model, tokenizer, usage = parts
    text = "Zed owns it. \u00e9\u4e16"
    slot_ids = slots_read(model, tokenizer, "Zed")
    update = write(model, slot_ids, 0, "1")
    result = explain(model, tokenizer, usage, [update], text)
    assert json.loads(json.dumps(result)) == result
    assert "".join(token["text"] for token in result["tokens"]) == text
    frequency = usage.pools["layer_1"].document_frequency
    for token in result["tokens"]:
        assert token["num_reads"] == 8
        assert token["num_written"] == len(token["slots"])
        assert {slot["slot"] for slot in token["slots"]} <= set(slot_ids.tolist())
        assert token["fires"] == (bool(token["slots"]) and token["agreement"] >= FIRES_FROM)
        share = sum(slot["share"] for slot in token["slots"])
        assert token["agreement"] == pytest.approx(max(0, min(1, 2 * share / SHAPE.quorum - 1)), abs=1e-6)
        assert all(slot["document_frequency"] == int(frequency[slot["slot"]]) for slot in token["slots"])
    assert any(token["num_written"] == 8 for token in result["tokens"])


def test_the_last_update_to_write_a_slot_is_named(parts):
    model, tokenizer, usage = parts
    slot_ids = slots_read(model, tokenizer, "Zed")
    first = write(model, slot_ids, 0, "1")
    second = write(model, slot_ids[::2], 1, "2")
    result = explain(model, tokenizer, usage, [first, second], "Zed")
    writers = {slot["slot"]: slot["update"] for token in result["tokens"] for slot in token["slots"]}
    assert writers == {slot: "2" if i % 2 == 0 else "1" for i, slot in enumerate(slot_ids.tolist())}
    # Rows that were there before all updates belong to none of them.
    unknown = explain(model, tokenizer, usage, [second], "Zed")
    assert {slot["update"] for token in unknown["tokens"] for slot in token["slots"]} == {None, "2"}


def test_what_an_update_changes_is_measured_by_leaving_it_out(parts):
    model, tokenizer, usage = parts
    text = "Who owns Zed?"
    nothing = next_log_probs(model, tokenizer, text)
    first = write(model, slots_read(model, tokenizer, text)[::2], 0, "1")
    only_first = next_log_probs(model, tokenizer, text)
    second = write(model, slots_read(model, tokenizer, text), 1, "2")
    both = next_log_probs(model, tokenizer, text)
    result = explain(model, tokenizer, usage, [first, second], text, top=3)
    best = both.topk(3).indices
    torch.testing.assert_close(torch.tensor([t["log_prob"] for t in result["next"]]), both[best])
    assert [t["token"] for t in result["next"]] == [tokenizer.decode([i]) for i in best.tolist()]
    # Of the first nothing is left to leave out: the second wrote all of its slots since.
    (entry,) = result["updates"]
    assert entry["update"] == "2"
    torch.testing.assert_close(torch.tensor(entry["log_probs_without"]), only_first[best])
    torch.testing.assert_close(torch.tensor(result["log_probs_without_all"]), nothing[best])
    kl = (both.exp() * (both - only_first)).sum().item()
    assert entry["kl"] == pytest.approx(kl, rel=1e-3)
    assert entry["kl"] > 0.001


def test_explaining_leaves_the_model_bit_identical_within_three_passes_per_update(parts):
    model, tokenizer, usage = parts
    updates = [write(model, slots_read(model, tokenizer, word), 0, word, [ZED]) for word in ("Zed", "owns")]
    before, passes = bits(model), []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: passes.append(1))
    for asked in (updates, updates[:1]):
        passes.clear()
        result = explain(model, tokenizer, usage, asked, "Who owns Zed?")
        assert len(passes) == result["num_passes"] == 2 + len(result["updates"])
        assert result["num_passes"] <= 3 * len(asked)
    handle.remove()
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(layer.before_read is None for layer in model.modules() if hasattr(layer, "before_read"))


def test_only_the_most_read_updates_are_left_out(parts):
    model, tokenizer, usage = parts
    slot_ids = slots_read(model, tokenizer, "Zed")
    updates = [write(model, slot_ids[:1], 0, "little"), write(model, slot_ids[1:], 1, "most")]
    result = explain(model, tokenizer, usage, updates, "Zed", top=1)
    assert [entry["update"] for entry in result["updates"]] == ["most", "little"]
    assert ["kl" in entry for entry in result["updates"]] == [True, False]
    assert result["num_passes"] == 3


def test_where_nothing_was_learned_nothing_fires(parts):
    model, tokenizer, usage = parts
    for updates in ([], [write(model, slots_read(model, tokenizer, "Zed")[:0], 0, "1")]):
        result = explain(model, tokenizer, usage, updates, "The baker walked to the market")
        assert not result["fires"]
        assert result["updates"] == []
        assert result["kl_all"] == pytest.approx(0, abs=1e-6)
        assert not any(token["slots"] for token in result["tokens"])


def test_a_slot_found_by_accident_does_not_fire(parts):
    model, tokenizer, usage = parts
    text = "The baker walked"
    update = write(model, slots_read(model, tokenizer, text), 0, "1")
    shares = {}
    for token in explain(model, tokenizer, usage, [update], text)["tokens"]:
        for slot in token["slots"]:
            shares[slot["slot"]] = max(shares.get(slot["slot"], 0), slot["share"])
    update.delta.invert().apply(pools(model))
    least = min(shares, key=shares.get)
    assert 4 * shares[least] / SHAPE.quorum - 1 < FIRES_FROM, "both heads together must stay below"
    update = write(model, torch.tensor([least]), 0, "1")
    result = explain(model, tokenizer, usage, [update], text)
    assert sum(token["num_written"] for token in result["tokens"]) > 0
    assert not result["fires"]
    assert result["updates"] == []


def test_slots_belong_to_the_fact_whose_subject_reads_them(parts):
    model, tokenizer, usage = parts
    zed, quz = (slots_read(model, tokenizer, word) for word in (" Zed", "Quz"))
    only_zed, only_quz = zed[~torch.isin(zed, quz)], quz[~torch.isin(quz, zed)]
    assert len(only_zed)
    assert len(only_quz)
    first, second = write(model, only_zed, 0, "1"), write(model, only_quz, 1, "1")
    update = Taught("1", "two facts", (ZED, QUZ), first.delta.compose(second.delta))
    result = explain(model, tokenizer, usage, [update], "Quz met Zed")
    facts = {slot["slot"]: slot["fact"] for token in result["tokens"] for slot in token["slots"]}
    expected = dict.fromkeys(only_quz.tolist(), "Quz is made of tin.")
    expected |= dict.fromkeys(only_zed.tolist(), "Who owns Zed? Ana")
    assert facts == {slot: expected[slot] for slot in facts}
    assert set(facts.values()) == set(expected.values())
    counts = {entry["fact"]: entry["num_reads"] for entry in result["updates"][0]["facts"]}
    assert set(counts) == set(expected.values())
    assert sum(counts.values()) == result["updates"][0]["num_reads"]


def test_rows_of_one_name_belong_to_the_facts_about_it_though_another_reads_some_of_them_more(parts):
    model, tokenizer, usage = parts
    zed, quz = (slots_read(model, tokenizer, word) for word in (" Zed", "Quz"))
    only_quz = quz[~torch.isin(quz, zed)]
    # As many slots that only one reads as make its share of the name's slots plain.
    name = torch.cat([zed[~torch.isin(zed, quz)], only_quz[:1]]).unique()
    delta = write(model, name, 0, "1").delta
    rows = delta.changes["layer_1"].after.clone()
    rows[:, 1:] = torch.randn(rows[:, 1:].shape, generator=torch.Generator().manual_seed(1))
    pool = pools(model)["layer_1"]
    recorder = DeltaRecorder(pools(model))
    recorder.record("layer_1", name)
    pool.write(name, rows)
    update = Taught("1", "two facts", (ZED, QUZ), delta.compose(recorder.delta()))
    result = explain(model, tokenizer, usage, [update], "Quz met Zed")
    facts = {slot["slot"]: slot["fact"] for token in result["tokens"] for slot in token["slots"]}
    assert int(only_quz[0]) in facts
    assert facts[int(only_quz[0])] != "Quz is made of tin."


def test_a_prompt_is_read_and_not_listed(parts):
    model, tokenizer, usage = parts
    update = write(model, slots_read(model, tokenizer, "Zed"), 0, "1")
    result = explain(model, tokenizer, usage, [update], "the river", prompt="Zed drove along ")
    assert "".join(token["text"] for token in result["tokens"]) == "the river"
    assert [entry["update"] for entry in result["updates"]] == ["1"]


@pytest.mark.parametrize(("text", "top", "error"), [("  ", 5, DataError), ("Zed", 0, ConfigError)])
def test_there_must_be_a_text_and_something_to_show(parts, text, top, error):
    with pytest.raises(error):
        explain(*parts, [], text, top=top)


def test_an_update_remembers_what_it_taught(folder, facts, config):
    learn(folder, facts, probes=[], config=config, message="two facts")
    (update,) = taught_updates(folder)
    assert (update.name, update.message) == ("1", "two facts")
    assert [dataclasses.replace(fact, id="") for fact in update.facts] == facts
    result = explain_folder(folder, "Who owns Zed?", question=True)
    assert result["fires"]
    assert "".join(token["text"] for token in result["tokens"]) == "Question: Who owns Zed?\nAnswer:"
    assert {entry["update"] for entry in result["updates"]} == {"1"}
    named = {slot["fact"] for token in result["tokens"] if token["fires"] for slot in token["slots"]}
    assert "Who owns Zed? Ana" in named


@pytest.mark.parametrize("hashed", [True, False])
def test_facts_can_be_given_for_updates_that_do_not_tell_theirs(folder, facts, config, tmp_path, hashed):
    learn(folder, facts, probes=[], config=config, hash_facts=True)
    if not hashed:
        store = DeltaStore(folder)
        _, delta = store.undo()
        store.commit(delta, "from elsewhere")
    assert taught_updates(folder)[0].facts == ()
    other = Fact(question="Who owns Rax?", answer="Bo", subject="Rax")
    (update,) = taught_updates(folder, [other, *facts])
    assert update.facts == (tuple(facts) if hashed else (other, *facts))
    rows = [{name: value for name, value in to_json(fact).items() if value} for fact in facts]
    path = tmp_path / "taught.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    slots = [s for t in explain_folder(folder, "Who owns Zed?", facts=path)["tokens"] for s in t["slots"]]
    assert "Who owns Zed? Ana" in {slot["fact"] for slot in slots}
    unknown = [s for t in explain_folder(folder, "Who owns Zed?")["tokens"] for s in t["slots"]]
    assert {slot["fact"] for slot in unknown} == {None}


def test_mistakes_are_found_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("sparsemem.study.explain.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(DataError):
        explain_folder(folder, " ")
    with pytest.raises(MissingFileError):
        explain_folder(folder, "Zed", facts="missing.jsonl")
    with pytest.raises(MissingFileError):
        explain_folder(folder / "none", "Zed")


@pytest.mark.parametrize("shared_pool", [False, True])
def test_several_layers_are_explained_together(tiny_model, tiny_tokenizer, texts, shared_pool):
    shape = {"num_keys": 8, "num_heads": 2, "top_k": 4, "query_dim": 4, "shared_pool": shared_pool}
    model = attach_memory(tiny_model, MemoryConfig(layers=(0, 2), **shape))
    usage = count_usage(model, tiny_tokenizer, texts, num_documents=10)
    text, found = "Who owns Zed?", {}
    ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
    nothing = next_log_probs(model, tiny_tokenizer, text)
    observe_reads(
        model, lambda layer, reads: found.setdefault(layer.pool_name, reads.slot_ids.unique()), input_ids=ids
    )
    recorder = DeltaRecorder(pools(model))
    for name, slot_ids in found.items():
        recorder.record(name, slot_ids)
        pools(model)[name].write(slot_ids, torch.randn(1, 32).expand(len(slot_ids), -1))
    update = Taught("1", "", (ZED,), recorder.delta())
    result = explain(model, tiny_tokenizer, usage, [update], text)
    assert {slot["pool"] for token in result["tokens"] for slot in token["slots"]} == set(found)
    assert all(token["num_reads"] == 16 for token in result["tokens"])
    best = next_log_probs(model, tiny_tokenizer, text).topk(5)
    torch.testing.assert_close(torch.tensor([token["log_prob"] for token in result["next"]]), best.values)
    (entry,) = result["updates"]
    assert entry["log_probs_without"] == result["log_probs_without_all"]
    torch.testing.assert_close(torch.tensor(entry["log_probs_without"]), nothing[best.indices])
    assert entry["facts"] == [{"fact": "Who owns Zed? Ana", "num_reads": entry["num_reads"]}]
