import dataclasses
import json

import pytest
import torch
from tests.conftest import content

from sparsemem.config import MemoryConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, MissingFileError, OutputError, SparsememError
from sparsemem.memory.attach import memory_layers, pools
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load
from sparsemem.study.ask import ask_folder
from sparsemem.study.attach import attach_to_folder
from sparsemem.study.learn import evaluate_folder, learn
from sparsemem.study.measure import built_in_probe, num_base_values, resolve_probes


def rows_of(folder):
    pool = pools(load(folder)[0])["layer_1"]
    return pool.current(torch.arange(pool.num_slots))


def test_an_attached_folder_holds_the_memory_its_usage_and_no_update(folder, model_folder, tiny_model):
    model, tokenizer = load(folder)
    load_usage(folder / USAGE_FILE).check(model)
    assert len(DeltaStore(folder)) == 0
    assert tokenizer.eos_token == "<eos>"
    assert num_base_values(model) == sum(p.numel() for p in tiny_model.parameters())
    ids = torch.arange(4, 40).view(2, -1)
    assert torch.equal(model(input_ids=ids).logits, tiny_model(input_ids=ids).logits)


def test_attach_reports_what_it_made(model_folder, background, tmp_path):
    config = MemoryConfig(layers=(0, 2), num_keys=4, num_heads=1, top_k=2, query_dim=4)
    out = tmp_path / "new" / "out"
    report = attach_to_folder(
        str(model_folder), [background, str(background)], out, config, num_tokens=500, num_documents=10
    )
    assert report["num_tokens"] > 0
    del report["num_tokens"]
    assert report == {
        "folder": str(out),
        "base_model": str(model_folder),
        "layers": [0, 2],
        "num_slots": 16,
        "num_documents": 10,
    }
    assert [layer.block_index for layer in memory_layers(load(out)[0])] == [0, 2]


def test_of_a_document_what_was_read_in_it_is_asked(folder, config):
    text = "The tin of Zedek belongs to Quzar, and that of Anatol to Bonn."
    report = learn(folder, [Fact(statement=text)], probes=[], config=config)
    assert report["facts"]["num"] == 4
    assert report["facts"]["seen_f1"] is not None
    store = DeltaStore(folder)
    (commit,) = store.log()
    (row,) = store.details(commit.id)["facts"]
    assert row["statement"] == text
    assert "question" not in row


def test_learning_commits_what_it_reports(folder, facts, config):
    before = content(folder)
    report = learn(folder, facts, probes=[], config=config, message="two facts")
    assert json.loads(json.dumps(report)) == report
    store = DeltaStore(folder)
    (commit,) = store.log()
    delta, path = store.delta(commit.id), store.objects.path(commit.object)
    assert content(folder) == {**before, str(path.relative_to(folder)): path.read_bytes()}
    assert (commit.message, commit.id, commit.digest) == ("two facts", report["commit"], report["digest"])
    assert report["update"] == 1
    assert report["delta_bytes"] == path.stat().st_size
    assert report["num_slots_trained"] == delta.num_slots_trained > 0
    assert report["num_trained"] == delta.num_values
    assert report["changed_fraction"] == delta.num_values / num_base_values(load(folder)[0])
    details = store.details(commit.id)
    assert details["report"]["facts"] == report["facts"]
    assert details["config"]["num_epochs"] == config.num_epochs
    assert [row["subject"] for row in details["facts"]] == [fact.subject for fact in facts]
    assert (report["method"], report["seed"], report["prompt"]) == ("memory", 0, "qa")
    assert torch.equal(rows_of(folder)[delta.changes["layer_1"].slot_ids], delta.changes["layer_1"].after)


def test_updates_build_on_each_other_and_can_be_left_out(folder, facts, config):
    start = rows_of(folder)
    answers = [ask_folder(folder, "Who owns Zed?", max_new_tokens=5)]
    for number, fact in enumerate(facts, 1):
        assert learn(folder, [fact], probes=[], config=config)["update"] == number
        answers.append(ask_folder(folder, "Who owns Zed?", max_new_tokens=5))
    for without, expected in (("1", answers[0]), ("2", answers[1]), ("last", answers[1])):
        assert ask_folder(folder, "Who owns Zed?", without=without, max_new_tokens=5) == expected
    store = DeltaStore(folder)
    store.undo()
    store.undo()
    assert torch.equal(rows_of(folder), start)


def test_evaluating_agrees_with_what_learning_measured(folder, facts, config, tmp_path, texts):
    rows = [
        {"question": f.question, "answer": f.answer, "heldout_questions": f.heldout_questions} for f in facts
    ]
    (tmp_path / "facts.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    (tmp_path / "wiki.txt").write_text("\n".join(texts[:5]), encoding="utf-8")
    probes = [f"wiki={tmp_path / 'wiki.txt'}"]
    before = evaluate_folder(folder, facts=tmp_path / "facts.jsonl", probes=probes)
    assert (before["num_slots_trained"], before["changed_fraction"], before["delta_bytes"]) == (0, 0, 0)
    report = learn(folder, tmp_path / "facts.jsonl", probes=probes, config=config)
    after = evaluate_folder(folder, facts=tmp_path / "facts.jsonl", probes=probes)
    assert {**after["facts"], "before": before["facts"]} == report["facts"]
    wiki = report["probes"]["wiki"]
    assert (wiki["before"], wiki["after"]) == (
        before["probes"]["wiki"]["value"],
        after["probes"]["wiki"]["value"],
    )
    assert wiki["forgetting"] == pytest.approx(wiki["after"] / wiki["before"] - 1)
    for key in ("num_slots_trained", "changed_fraction", "delta_bytes", "method", "prompt"):
        assert after[key] == report[key]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"facts": []}, DataError),
        ({"facts": "missing.jsonl"}, MissingFileError),
        ({"probes": ["nameless.jsonl"]}, ConfigError),
        ({"probes": ["p=missing.jsonl"]}, MissingFileError),
        ({"prompt": "nonsense"}, ConfigError),
        ({"out": "somewhere"}, ConfigError),
    ],
    ids=str,
)
def test_a_mistake_is_an_error_and_changes_nothing(folder, facts, config, options, error):
    before = content(folder)
    with pytest.raises(error):
        learn(folder, **{"facts": facts, "probes": [], "config": config, **options})
    assert content(folder) == before


def test_facts_and_probes_are_read_before_the_model(folder, monkeypatch):
    monkeypatch.setattr("sparsemem.study.session.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(MissingFileError):
        learn(folder, "missing.jsonl")
    with pytest.raises(MissingFileError):
        learn(folder, [Fact(statement="So.")], probes=["p=missing.jsonl"])
    with pytest.raises(MissingFileError):
        evaluate_folder(folder, facts="missing.jsonl")
    (folder / USAGE_FILE).unlink()
    with pytest.raises(MissingFileError, match=USAGE_FILE):
        learn(folder, [Fact(statement="So.")])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "lorra"}, "method='lorra'"),
        ({"method": "lora", "out": "memory folder"}, "exists already"),
        ({"prompt": "nonsense"}, "prompt='nonsense'"),
    ],
    ids=str,
)
def test_options_are_checked_before_the_minutes_of_measuring_and_training(
    folder, facts, config, monkeypatch, options, reason
):
    monkeypatch.setattr("sparsemem.study.session.load", lambda *_: pytest.fail("the model was loaded"))
    given = {"probes": [], **options}
    config = dataclasses.replace(config, method=given.pop("method", "memory"))
    if "out" in given:
        given["out"] = folder
    with pytest.raises(SparsememError, match=reason):
        learn(folder, facts, config=config, **given)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_baseline_can_be_kept_elsewhere(folder, facts, config, tmp_path):
    before = content(folder)
    config = dataclasses.replace(config, method="lora", peft={"r": 2})
    report = learn(folder, facts, probes=[], config=config, out=tmp_path / "adapter")
    assert content(folder) == before
    assert report["out"] == str(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert report["num_slots_trained"] == 0
    assert report["delta_bytes"] == 4 * report["num_trained"] > 0
    with pytest.raises(OutputError, match="adapter exists already"):
        learn(folder, facts, probes=[], config=config, out=tmp_path / "adapter")


def test_the_built_in_probe_has_160_questions_with_answers():
    (probe,) = resolve_probes(None)
    assert (probe.name, probe.metric) == ("general_knowledge", "f1")
    assert len(probe.questions) == len({question.question for question in probe.questions}) == 160
    assert all(question.answers for question in probe.questions)
    assert built_in_probe().endswith("general_knowledge.jsonl")
    assert resolve_probes([]) == []
