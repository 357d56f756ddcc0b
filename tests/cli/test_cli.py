"""The main job by its commands, from attach to undo."""

import pytest
import torch
from tests.conftest import content

import sparsemem
from sparsemem.cli.app import main
from sparsemem.store.load import load

from .conftest import SHAPE, object_of

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FACT_KEYS = {"num", "seen_f1", "seen_em", "heldout_f1", "heldout_em", "heldout_recall"}
REPORT_KEYS = {
    "facts",
    "probes",
    "num_slots_trained",
    "changed_fraction",
    "delta_bytes",
    "seconds",
    "method",
    "seed",
}
QUICK = ["--num-epochs", "2", "--top-t", "6"]


@torch.no_grad()
def logits_of(folder):
    return load(folder)[0](input_ids=torch.arange(4, 64).view(3, -1)).logits


def test_attach_learn_evaluate_ask_and_undo(run_json, model_folder, inputs, probes, tmp_path):
    folder, facts = tmp_path / "smol", inputs / "facts.jsonl"
    background = inputs / "background.jsonl"
    attached = run_json("attach", model_folder, "--background", background, "--out", folder, *SHAPE)
    assert attached["num_slots"] == 64
    assert attached["layers"] == [1]
    start, files = logits_of(folder), content(folder)

    report = run_json("learn", folder, facts, "-m", "two facts", *QUICK, *probes)
    assert set(report) >= REPORT_KEYS
    assert set(report["facts"]) >= FACT_KEYS
    assert set(report["probes"]) == {"closed", "choice", "plain"}
    for kind, metric in (("closed", "f1"), ("choice", "accuracy"), ("plain", "perplexity")):
        assert set(report["probes"][kind]) >= {"metric", "before", "after", "forgetting"}
        assert report["probes"][kind]["metric"] == metric
    assert (report["method"], report["seed"]) == ("memory", 0)
    assert report["facts"]["num"] == 2
    assert 0 < report["num_slots_trained"] <= 12
    assert 0 < report["changed_fraction"] < 1
    assert report["delta_bytes"] == object_of(folder).stat().st_size
    assert not torch.equal(logits_of(folder), start)

    scores = run_json("evaluate", folder, "--facts", facts, *probes)
    assert set(scores) >= REPORT_KEYS
    assert set(scores["facts"]) == FACT_KEYS
    for kind, probe in scores["probes"].items():
        assert set(probe) == {"metric", "value", "num"}
        assert probe["value"] == report["probes"][kind]["after"]

    answer = run_json("ask", folder, "Who owns Zed?", "--max-new-tokens", "4")
    assert set(answer) == {"question", "answer"}
    assert answer["question"] == "Who owns Zed?"
    without = run_json("ask", folder, "Who owns Zed?", "--without", "last", "--max-new-tokens", "4")

    undone = run_json("learn", folder, "--undo")
    assert undone["undone"]["message"] == "two facts"
    assert undone["undone"]["digest"] == report["digest"]
    assert undone["num_updates"] == 0
    assert torch.equal(logits_of(folder), start)
    run_json("gc", folder)
    assert content(folder) == files
    assert run_json("ask", folder, "Who owns Zed?", "--max-new-tokens", "4") == without


def test_people_get_text_on_stderr_and_answers_on_stdout(run, folder, inputs, probes):
    facts = inputs / "facts.jsonl"
    code, out, err = run("learn", folder, facts, *QUICK, *probes)
    assert (code, out) == (0, "")
    assert "2 facts" in err
    assert "perplexity" in err
    assert "learn DIR --undo" in err
    code, out, err = run("evaluate", folder, "--facts", facts, *probes)
    assert (code, out) == (0, "")
    assert "accuracy" in err
    code, out, _ = run("ask", folder, "Who owns Zed?", "--max-new-tokens", "3")
    assert code == 0
    assert out.count("\n") == 1
    code, out, err = run("learn", folder, "--undo")
    assert (code, out) == (0, "")
    assert "took back update 1" in err


def test_by_default_general_knowledge_is_the_probe(run_json, folder, inputs):
    report = run_json("evaluate", folder)
    assert list(report["probes"]) == ["general_knowledge"]
    assert report["probes"]["general_knowledge"]["num"] == 160
    assert report["facts"]["num"] == 0


def test_baselines_print_the_same_report_and_leave_the_folder_alone(run_json, folder, inputs, probes):
    before, facts, keys = content(folder), inputs / "facts.jsonl", {}
    for method in (["full"], ["lora", "--peft", "r=2", "lora_alpha=4"]):
        report = run_json("learn", folder, facts, *QUICK, *probes, "--method", *method)
        assert report["method"] == method[0]
        assert report["changed_fraction"] > 0
        keys[method[0]] = set(report)
        assert content(folder) == before
    keys["memory"] = set(run_json("learn", folder, facts, *QUICK, *probes)) - {"update", "digest", "commit"}
    assert keys["full"] == keys["lora"] == keys["memory"] >= REPORT_KEYS


def test_a_document_is_learned_too(run_json, folder, inputs):
    (inputs / "documents.txt").write_text("Jov left.\nWho knows why?\n", encoding="utf-8")
    report = run_json("learn", folder, inputs / "documents.txt", *QUICK, "--probes")
    assert report["facts"]["num"] == 2
    assert report["num_slots_trained"] > 0


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["ask"], ["learn", "dir", "--nonsense"]])
def test_what_cannot_be_parsed_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: sparsemem" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"sparsemem {sparsemem.__version__}\n"
