import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsemem.config import DEFAULT_LEARNING_RATES, FinetuneConfig, to_json
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, OutputError
from sparsemem.evaluation.evaluate import MAX_ANSWER_TOKENS
from sparsemem.evaluation.generate import answer_questions
from sparsemem.evaluation.metrics import mean, normalize
from sparsemem.files import read_json, write_json, write_jsonl
from sparsemem.memory.attach import memory_layers, pools
from sparsemem.memory.base_model import load_base_model
from sparsemem.memory.checkpoint import read_header
from sparsemem.study import base_scores
from sparsemem.study import run as run_module
from sparsemem.study.learn import learn
from sparsemem.study.provenance import data_sha
from sparsemem.study.run import attached_folder, main, perform

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LORA = {"method": "lora", "peft": {"r": 2}, "num_epochs": 1}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def run(spec, cache):
    """Perform the spec with some options changed, all with one cache."""
    return lambda **options: perform(dataclasses.replace(spec, **options), cache)


@pytest.fixture
def calls(monkeypatch):
    """Names of the slow parts that were run, with what they were given."""
    made = []
    parts = [
        (base_scores, "measure"),
        *((run_module, name) for name in ("attach_to_folder", "measure", "train")),
    ]
    for module, name in parts:
        original = getattr(module, name)

        def record(*args, name=name, original=original, **options):
            made.append((name, args))
            return original(*args, **options)

        monkeypatch.setattr(module, name, record)
    return made


def titles(calls):
    """What was attached, trained and measured, in order."""
    return [args[0] if name == "measure" else name for name, args in calls]


def test_a_run_says_what_it_was_what_it_measured_and_where_it_comes_from(spec, run, cache):
    result = run(config={**spec.config, "seed": 3})
    assert json.loads(json.dumps(result)) == result
    assert (
        result["config"] | {"method": "memory", "learning_rate": DEFAULT_LEARNING_RATES["memory"], "top_t": 6}
        == result["config"]
    )
    assert result["config"]["memory"] == to_json(spec.memory_config)
    assert (result["config"]["facts"], result["config"]["prompt"]) == (spec.facts, "qa")
    assert result["seed"] == result["config"]["seed"] == 3
    assert result["data_sha"] == data_sha(spec.files)
    (folder,) = (cache / "memories").iterdir()
    assert result["model_sha"] == read_header(folder)["base_fingerprint"]
    metrics = result["metrics"]
    assert 0 < metrics["num_slots_trained"] <= 4 * 6
    assert metrics["train_seconds"] <= result["seconds"]
    assert metrics["base_unchanged"] is True
    for state, facts in (("before", metrics["facts"]["before"]), ("after", metrics["facts"])):
        scores = result["scores"][state]
        assert (len(scores["seen"]), len(scores["heldout"])) == (4, 4)
        assert mean(scores["seen"]) == facts["seen_f1"]
        assert mean(scores["heldout"]) == facts["heldout_f1"]
        assert set(scores["probes"]) == {"closed"}
        assert mean(scores["probes"]["closed"]) == metrics["probes"]["closed"][state]


def test_a_run_is_attaching_and_learning(spec, run, cache, tmp_path):
    metrics = run()["metrics"]
    (folder,) = (cache / "memories").iterdir()
    report = learn(folder, spec.facts, probes=spec.probes, config=spec.finetune_config)
    for key in ("facts", "probes", "num_slots_trained", "num_trained", "changed_fraction", "final_loss"):
        assert metrics[key] == report[key]


def test_runs_share_the_memory_and_what_was_measured_before(spec, run, calls):
    first = run()
    assert titles(calls) == ["attach_to_folder", "measure before", "train", "measure after"]
    calls.clear()
    second = run(config={**spec.config, "seed": 1})
    assert titles(calls) == ["train", "measure after"]
    assert second["scores"]["before"] == first["scores"]["before"]
    assert second["metrics"]["facts"]["before"] == first["metrics"]["facts"]["before"]
    calls.clear()
    run(num_facts=2, memory={**spec.memory, "top_k": 2})
    assert titles(calls) == ["attach_to_folder", "measure before", "train", "measure after"]


def test_what_is_kept_of_a_memory_changes_no_score(spec, run, cache):
    first = run()
    kept = list((cache / "scores").glob("*.pt"))
    assert len(kept) == 1
    assert run()["scores"] == first["scores"]
    kept[0].unlink()  # as a baseline leaves it, which has nothing to keep
    assert run()["scores"] == first["scores"]
    assert kept[0].is_file()


def test_a_baseline_trains_the_model_as_it_came(spec, run, calls):
    memory = run()
    for config in (LORA, {"method": "full", "num_epochs": 1, "learning_rate": 0.01}):
        calls.clear()
        result = run(config=config, background=())
        assert titles(calls) == ["train", "measure after"]
        assert list(memory_layers(calls[0][1][0])) == []
        assert "base_unchanged" not in result["metrics"]
        assert result["scores"]["before"] == memory["scores"]["before"]
        assert result["model_sha"] == memory["model_sha"]
        plain = result["metrics"]["probes"]["plain"]
        assert plain["before"] == memory["metrics"]["probes"]["plain"]["before"] != plain["after"]


def test_a_memory_in_place_of_the_network_is_another_model_before(spec, run):
    before = [
        run(memory={**spec.memory, "placement": placement})["metrics"]["probes"]["plain"]["before"]
        for placement in ("add", "replace")
    ]
    assert before[0] != before[1]


def test_background_is_there_for_what_needs_it(spec, run, calls, texts):
    for config, expected in ((LORA, []), ({**LORA, "replay_fraction": 0.5}, texts)):
        calls.clear()
        run(config=config)
        assert next(args for name, args in calls if name == "train")[5] == expected


def test_known_facts_can_be_left_out(spec, run, model_folder):
    facts = spec.load_facts()
    model, tokenizer = load_base_model(str(model_folder))
    questions = [fact.question for fact in facts]
    answers = answer_questions(model, tokenizer, questions, max_new_tokens=MAX_ANSWER_TOKENS)
    known = next(number for number, answer in enumerate(answers) if normalize(answer))
    rows = [{"question": fact.question, "answer": fact.answer} for fact in facts]
    rows[known]["answer"] = answers[known]
    write_jsonl(Path(spec.facts), rows)
    assert run()["metrics"]["facts"]["before"]["seen_f1"] >= 0.25
    result = run(known_wrong_only=True)
    assert result["metrics"]["facts"]["num"] == 3
    assert max(result["scores"]["before"]["seen"]) < 0.5
    with pytest.raises(DataError, match="knows all 1 facts"):
        run(known_wrong_only=True, first_fact=known, num_facts=1)


def test_bfloat16_is_for_measuring_only_and_leaves_the_memory_exact(run, calls):
    run(eval_dtype="bfloat16")
    dtypes = {}
    for name, args in calls:
        if name != "attach_to_folder":
            model = args[1] if name == "measure" else args[0]
            (layer,) = memory_layers(model)
            weights = next(model.parameters()).dtype, layer.keys.dtype, layer.pool.rows.dtype
            dtypes[args[0] if name == "measure" else name] = weights
    exact = torch.float32
    assert dtypes == {
        "measure before": (torch.bfloat16, exact, exact),
        "train": (exact, exact, exact),
        "measure after": (torch.bfloat16, exact, exact),
    }


@torch.no_grad()
def move_a_weight(model):
    weight = model.lm_head.weight
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))


@torch.no_grad()
def move_a_key(model):
    next(memory_layers(model)).keys[0, 0, 0, 0] += 1


def write_an_unselected_row(model):
    pool = pools(model)["layer_1"]
    free = next(slot for slot in range(pool.num_slots) if slot not in pool.written()[0])
    pool.write(torch.tensor([free]), torch.ones(1, pool.value_dim))


@pytest.mark.parametrize("move", [move_a_weight, move_a_key, write_an_unselected_row])
def test_one_bit_that_moved_elsewhere_is_noticed(run, monkeypatch, move):
    def train(model, *args):
        result = original(model, *args)
        move(model)
        return result

    original = run_module.train
    monkeypatch.setattr(run_module, "train", train)
    assert run()["metrics"]["base_unchanged"] is False


def test_of_two_that_attach_at_once_the_slower_takes_the_folder_of_the_other(spec, cache, monkeypatch):
    def slower(_model, _background, folder, *_args, **_options):
        folder.mkdir(parents=True)
        raise OutputError("not empty")

    def broken(*_args, **_options):
        raise OutputError("no space")

    monkeypatch.setattr(run_module, "attach_to_folder", broken)
    with pytest.raises(OutputError, match="no space"):
        attached_folder(spec, [], cache)
    monkeypatch.setattr(run_module, "attach_to_folder", slower)
    assert attached_folder(spec, [], cache).parent == cache / "memories"


@pytest.mark.parametrize("read", [True, False])
def test_of_a_document_the_same_is_asked_however_it_is_learned(run, tmp_path, read):
    text = "The tin of Zedek belongs to Quzar, and that of Anatol to Bonn."
    write_jsonl(tmp_path / "text.jsonl", [{"text": text}])
    options = {**LORA, "read_documents": read}
    result = run(facts=str(tmp_path / "text.jsonl"), num_facts=1, probes=(), config=options)
    assert result["metrics"]["facts"]["num"] == 4


def test_a_slice_of_the_facts_is_what_is_learned(spec):
    slice_of = dataclasses.replace(spec, first_fact=1, num_facts=2)
    assert [fact.answer for fact in slice_of.load_facts()] == ["Bo", "Cy"]
    for options in ({"num_facts": 5}, {"first_fact": 4}, {"first_fact": 3, "num_facts": 2}):
        with pytest.raises(DataError, match="has 4 facts"):
            dataclasses.replace(spec, **options).load_facts()


def test_of_the_paraphrases_as_many_are_kept_as_asked_for(spec, tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        '{"statement": "Zed is Ana\'s.", "answer": "Ana", "paraphrases": ["Ana has Zed.", "Zed? Ana\'s."]}'
    )
    of_run = dataclasses.replace(spec, facts=str(facts))
    for num, kept in ((0, 0), (1, 1), (9, 2), (None, 2)):
        (fact,) = dataclasses.replace(of_run, num_paraphrases=num).load_facts()
        assert fact.paraphrases == ("Ana has Zed.", "Zed? Ana's.")[:kept]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"config": {"top": 3}}, "unknown option 'top'"),
        ({"config": {"top_t": 0}}, "top_t=0 is not positive"),
        ({"memory": {"top_k": 0}}, "top_k=0 is not positive"),
        ({"attach": {"num": 3}}, "unknown option 'num'; known are keys, num_tokens"),
        ({"background": ()}, "method='memory' needs background text"),
        ({"background": (), "config": {"method": "full", "penalty": "kl"}}, "method='full' needs background"),
        ({"eval_dtype": "half"}, "eval_dtype='half' is unknown"),
        ({"prompt": "poem"}, "prompt='poem' is unknown"),
        ({"first_fact": -1}, "first_fact=-1"),
        ({"num_facts": 0}, "num_facts=0"),
        ({"num_paraphrases": -1}, "num_paraphrases=-1 is negative"),
    ],
    ids=str,
)
def test_a_mistake_is_found_when_the_spec_is_built(spec, options, reason):
    with pytest.raises(ConfigError, match=reason):
        dataclasses.replace(spec, **options)


def test_a_process_of_its_own_writes_the_result_or_says_why_not(
    spec, run, cache, tmp_path, capsys, monkeypatch
):
    given, out = tmp_path / "spec.json", tmp_path / "result.json"
    write_json(given, to_json(spec))
    assert main([str(given), str(out), str(cache)]) == 0
    assert read_json(out)["metrics"]["facts"] == run()["metrics"]["facts"]
    out.unlink()
    write_json(given, {**to_json(spec), "facts": "none.jsonl"})
    assert main([str(given), str(out), str(cache)]) == 2
    assert capsys.readouterr().err.strip().endswith("error: none.jsonl does not exist; check the path")

    def stop(*_args):
        raise KeyboardInterrupt

    write_json(given, to_json(spec))
    monkeypatch.setattr(run_module, "train", stop)
    assert main([str(given), str(out), str(cache)]) == 130
    assert not out.exists()


STREAM = {"stream": True, "facts_per_batch": 1, "num_epochs": 1}


def test_a_stream_is_asked_right_after_each_batch_and_at_the_end(spec, run, monkeypatch):
    def recall(model, tokenizer, facts, *options):
        asked.append([fact.answer for fact in facts])
        return original(model, tokenizer, facts, *options)

    asked = []
    original = run_module.recall
    monkeypatch.setattr(run_module, "recall", recall)
    metrics = run(config={**STREAM, "facts_per_batch": 3})["metrics"]
    assert asked == [["Ana", "Bo", "Cy"], ["Di"], ["Ana", "Bo", "Cy", "Di"]]
    stream = metrics["stream"]
    assert stream["all"] == stream["first_100"]
    assert stream["all"]["num"] == 4
    assert stream["all"]["seen"]["at_end"] == metrics["facts"]["seen_f1"]
    assert stream["all"]["heldout"]["at_end"] == metrics["facts"]["heldout_f1"]
    assert "stream" not in run(config={"num_epochs": 1})["metrics"]


def test_recall_in_a_stream_is_that_of_the_model_it_is_given(spec, monkeypatch):
    """Of facts with a trained question, held-out ones, or both; None where there is no such question."""

    def recall(model, _tokenizer, facts, *_options):
        seen = [fact for fact in facts if fact.question]
        heldout = [fact for fact in facts for _ in fact.heldout_questions]
        scores = [[float(fact.answer in known[model]) for fact in asked] for asked in (seen, heldout)]
        return SimpleNamespace(seen_scores=scores[0], heldout_scores=scores[1])

    monkeypatch.setattr(run_module, "recall", recall)
    monkeypatch.setattr(run_module, "answer_tokens", lambda *_: 16)
    known = {"a": ["A"], "b": ["B"], "c": [], "end": ["B", "C"]}
    facts = [
        Fact(question="A?", answer="A"),
        Fact(statement="B.", answer="B", heldout_questions=("B?", "So B?", "Then B?")),
        Fact(question="C?", answer="C", heldout_questions=("So C?",)),
    ]

    def kept(facts):
        stream = run_module._Stream(None, facts, dataclasses.replace(spec, config=STREAM))
        for step, _ in zip("abc", facts, strict=False):
            stream.ask(step)
        return stream.kept("end")["all"]

    assert kept(facts) == {
        "num": 3,
        "seen": {"right_after": 0.5, "at_end": 0.5},
        "heldout": {"right_after": 0.75, "at_end": 1.0},
    }
    assert kept(facts[:1])["heldout"] == {"right_after": None, "at_end": None}


def test_a_stream_with_facts_that_cannot_be_trained_is_refused_before_training(spec, run, calls):
    rows = [
        {"question": "Who owns Zed?", "answer": "Ana"},
        {"statement": f"{'It was cold. ' * 500}Quz is made of tin.", "answer": "tin"},
    ]
    write_jsonl(Path(spec.facts), rows)
    with pytest.raises(DataError, match="1 of 2 facts have nothing to learn within max_length"):
        run(config=STREAM)
    assert "train" not in titles(calls)
    assert run(config={"num_epochs": 1})["metrics"]["facts"]["num"] == 2


def test_where_a_run_comes_from_is_read_when_it_starts(run, monkeypatch):
    def train(*args):
        monkeypatch.setattr("sparsemem.study.provenance._git", lambda *_: "later")
        return original(*args)

    original = run_module.train
    monkeypatch.setattr("sparsemem.study.provenance._git", lambda *_: "now")
    monkeypatch.setattr(run_module, "train", train)
    result = run(config=LORA, background=())
    assert result["commit"] == "now"
    assert result["peak_bytes"] > 0


def test_a_run_is_described_by_what_applies_with_its_defaults(spec):
    memory = dataclasses.replace(spec, config={"method": "memory"}).described()
    assert (memory["penalty"], memory["penalty_weight"], memory["adam_beta1"]) == ("local_kl", 0.3, 0.5)
    assert memory["top_t"] == FinetuneConfig().top_t
    full = dataclasses.replace(spec, config={"method": "full"}).described()
    assert (full["penalty"], full["learning_rate"], full["adam_beta1"]) == ("none", 5e-5, 0.9)
    only_of_memory = {"top_t", "anchor", "memory", "attach", "held_per_step", "penalty_weight"}
    assert only_of_memory <= memory.keys() - full.keys()
