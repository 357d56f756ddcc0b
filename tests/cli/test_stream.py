import io
import json

import pytest

from sparsemem.store.history import DeltaStore

QUICK = ["--num-epochs", "1", "--top-t", "6", "--probes"]


def test_a_stream_learns_and_says_what(run, run_json, folder, inputs):
    code, out, err = run("stream", folder, inputs / "facts.jsonl", "--batch-size", "1", *QUICK)
    assert (code, out) == (0, "")
    assert "update 2 (" in err
    assert "2 learned, 0 refused" in err
    assert run_json("stream", folder, inputs / "facts.jsonl", *QUICK)["known"] == 2
    assert len(run_json("log", folder)["commits"]) == 2


def test_standard_input_is_a_source(run_json, folder, monkeypatch):
    row = {"question": "Who owns Zed?", "answer": "Ana", "subject": "Zed"}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(row) + "\n"))
    assert run_json("stream", folder, "-", *QUICK)["learned"] == 1


def test_facts_are_proposed_reviewed_approved_and_rejected(run, run_json, folder, inputs):
    assert run_json("stream", folder, inputs / "facts.jsonl", "--propose", *QUICK)["proposed"] == 2
    waiting = run_json("review", folder)["facts"]
    assert {row["status"] for row in waiting} == {"pending"}
    assert "pending" in run("review", folder)[2]
    shas = [row["sha"] for row in waiting]
    assert run_json("reject", folder, shas[0][:6]) == {"rejected": [shas[0]]}
    assert run_json("approve", folder, "all", *QUICK)["learned"] == 1
    assert run_json("review", folder) == {"facts": []}
    assert {row["status"] for row in run_json("review", folder, "--all")["facts"]} == {"rejected", "approved"}
    assert "nothing waits" in run("review", folder)[2]
    assert len(DeltaStore(folder)) == 1


def test_the_policy_of_the_folder_holds_unless_told_otherwise(run, run_json, folder, inputs):
    (folder / "policy.yaml").write_text("sources: ['/approved/*']\n", encoding="utf-8")
    argv = ["stream", folder, inputs / "facts.jsonl", *QUICK]
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert "none of the allowed sources" in err
    assert run_json(*argv[:3], "--no-policy", *QUICK)["learned"] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stream", "{folder}", "none.jsonl"], "none.jsonl does not exist"),
        (["stream", "{folder}", "{inputs}/facts.jsonl", "--policy", "none.yaml"], "none.yaml"),
        (["stream", "{folder}", "{inputs}/facts.jsonl", "--batch-size", "0"], "batch_size=0"),
        (["stream", "{folder}", "{inputs}/facts.jsonl", "--method", "full"], "method='full'"),
        (["approve", "{folder}", "abcdef"], "no fact 'abcdef' waits"),
        (["reject", "{folder}", "abcdef"], "no fact 'abcdef' waits"),
        (["review", "{inputs}"], "holds no memory_config.json"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(run, folder, inputs, argv, message):
    code, out, err = run(*(arg.format(folder=folder, inputs=inputs) for arg in argv))
    assert (code, out) == (2, "")
    assert message in err.strip().split("\n")[-1]
    assert len(DeltaStore(folder)) == 0
