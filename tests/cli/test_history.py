import json

import pytest
import torch

from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load

QUICK = ["--num-epochs", "2", "--top-t", "6", "--probes"]
NAMES = ("Zed", "Quz", "Jov", "Wix")


@pytest.fixture
def teach(run_json, inputs):
    """Learn one fact about a name, and return the report."""

    def teach(folder, name, *options):
        row = {"question": f"Who owns {name}?", "answer": "Ana", "subject": name}
        (inputs / "one.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        return run_json("learn", folder, inputs / "one.jsonl", "-m", f"about {name}", *QUICK, *options)

    return teach


@pytest.fixture
def three(folder, teach):
    """A folder with three updates."""
    for name in NAMES[:3]:
        teach(folder, name)
    return folder


@torch.no_grad()
def logits(folder, revision="HEAD"):
    model, _ = load(folder, revision=revision)
    return model(input_ids=torch.arange(4, 64).view(3, -1)).logits


def asked(rows):
    return [row["question"] for row in rows]


def test_log_lists_updates_for_people_and_machines(run, run_json, three):
    commits = run_json("log", three)["commits"]
    assert [(c["number"], c["message"]) for c in commits] == [
        (3, "about Jov"),
        (2, "about Quz"),
        (1, "about Zed"),
    ]
    assert commits[0]["refs"] == ["main"]
    assert len(run_json("log", three, "HEAD~1")["commits"]) == 2
    code, out, err = run("log", three)
    assert (code, out) == (0, "")
    assert "about Quz" in err
    _, out, _ = run("log", three, "--csv")
    header, *lines = out.strip().split("\n")
    assert header.startswith("number,commit,time,message,num_slots,num_facts,heldout_f1,seen_f1")
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3"]
    _, out, _ = run("log", three, "--prometheus")
    assert "# TYPE sparsemem_updates gauge\nsparsemem_updates 3\n" in out
    assert run_json("log", three, "--journal")["journal"][0]["action"] == "commit"
    _, _, err = run("log", three, "--journal")
    assert "commit" in err


def test_metrics_name_each_probe(run, folder, inputs, teach, probes):
    teach(folder, "Zed")
    argv = ["learn", folder, inputs / "facts.jsonl", "--num-epochs", "1", *probes]
    assert run(*argv)[0] == 0
    _, out, _ = run("log", folder, "--csv")
    assert "after.plain" in out.split("\n")[0]
    _, out, _ = run("log", folder, "--prometheus")
    assert 'sparsemem_probe_after{probe="plain"}' in out


def test_of_an_empty_history_there_is_nothing_to_list(run, run_json, folder):
    assert run_json("log", folder) == {"commits": []}
    _, _, err = run("log", folder)
    assert "learned nothing yet" in err
    assert run("log", folder, "--csv")[1].startswith("number,commit")
    assert "sparsemem_updates 0" in run("log", folder, "--prometheus")[1]
    code, _, err = run("show", folder)
    assert code == 2
    assert "learn something first" in err


def test_show_tells_what_an_update_taught(run, run_json, three):
    shown = run_json("show", three, "2")
    assert asked(shown["facts"]) == ["Who owns Quz?"]
    assert shown["config"]["top_t"] == 6
    _, _, err = run("show", three, "HEAD")
    assert "Who owns Jov? Ana" in err


def test_facts_can_be_kept_out_of_the_history(run_json, folder, teach):
    teach(folder, "Zed", "--hash-facts")
    (row,) = run_json("show", folder)["facts"]
    assert list(row) == ["sha"]


def test_diff_tells_facts_slots_and_answers(run, run_json, three, inputs):
    questions = inputs / "closed.jsonl"
    found = run_json("diff", three, "1", "HEAD", "--questions", questions)
    assert asked(found["gained"]) == ["Who owns Quz?", "Who owns Jov?"]
    assert found["lost"] == []
    assert found["num_slots"] > 0
    assert all(row["old"] != row["new"] for row in found["answers"])
    back = run_json("diff", three, "HEAD", "attached")
    assert len(back["lost"]) == 3
    _, _, err = run("diff", three, "attached", "HEAD", "--questions", questions)
    assert "Who owns Zed? Ana" in err
    assert run_json("diff", three, "HEAD", "HEAD")["num_slots"] == 0


def test_revert_takes_one_from_the_middle(run, run_json, three, teach):
    """Whether tiny random facts share slots is chance: both ways must come out right."""
    code, _, err = run("revert", three, "2", "-m", "no more Quz")
    if code == 2:
        assert "at stake: 'Who owns Jov?'" in err
        assert run_json("revert", three, "2", "--relearn")["relearned"] == ["Who owns Jov?"]
    assert asked(DeltaStore(three).facts(DeltaStore(three).head())) == ["Who owns Zed?", "Who owns Jov?"]
    assert run("verify", three)[0] == 0


def test_reverting_the_last_gives_the_logits_before(run_json, three):
    expected = logits(three, "HEAD~1")
    run_json("revert", three, "HEAD")
    assert torch.equal(logits(three), expected)
    assert len(run_json("log", three)["commits"]) == 4


def test_two_branches_are_learned_and_merged(run, run_json, folder, teach):
    teach(folder, "Zed")
    run_json("branch", folder, "team-b")
    teach(folder, "Quz")
    assert run_json("checkout", folder, "team-b")["head"] == "team-b"
    teach(folder, "Jov")
    assert set(run_json("branch", folder)["refs"]) == {"main", "team-b"}
    assert "* team-b" in run("branch", folder)[2]
    run_json("checkout", folder, "main")
    merged = run_json("merge", folder, "team-b", "--relearn")
    store = DeltaStore(folder)
    assert sorted(asked(store.facts(store.head()))) == [f"Who owns {name}?" for name in ("Jov", "Quz", "Zed")]
    assert merged["commit"]["second_parent"] == store.resolve("team-b")
    assert run_json("merge", folder, "team-b")["commit"] is None
    run_json("checkout", folder, "team-b")
    assert run_json("merge", folder, "main")["fast_forward"] is True
    assert run("verify", folder)[0] == 0
    assert run_json("branch", folder, "main", "--delete") == {"deleted": "main"}


def test_a_pick_takes_one_update(run_json, three, teach):
    run_json("checkout", three, "1")
    picked = run_json("cherry-pick", three, "main", "--theirs")
    store = DeltaStore(three)
    assert asked(store.facts(picked["commit"]["id"])) == ["Who owns Zed?", "Who owns Jov?"]


def test_checkout_and_tags(run_json, three):
    run_json("tag", three, "v1", "HEAD~1")
    expected = logits(three, "v1")
    run_json("checkout", three, "v1")
    assert torch.equal(logits(three), expected)
    assert len(run_json("log", three)["commits"]) == 2
    assert run_json("tag", three)["refs"].keys() == {"v1"}


def test_export_and_import(run, run_json, made_once, three, folder, tmp_path):
    import shutil

    copy = shutil.copytree(made_once["attached"], tmp_path / "copy")
    assert run_json("export", three, tmp_path / "all.zip")["num_commits"] == 3
    assert list(run_json("import", copy, tmp_path / "all.zip")["branches"]) == ["imported/main"]
    run_json("merge", copy, "imported/main")
    assert torch.equal(logits(copy), logits(three))
    assert "imported/main" in run("import", copy, tmp_path / "all.zip")[2]


def test_gc_and_verify(run, run_json, three):
    assert run_json("verify", three) == {"problems": []}
    run_json("learn", three, "--undo")
    gone = run_json("gc", three)
    assert (gone["num_commits"], gone["num_objects"]) == (1, 1)
    path = next((three / "objects").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = run("verify", three)
    assert code == 1
    assert path.name in err


MISTAKES = {
    "show nonsense": (("show", "nonsense"), "no update 'nonsense'"),
    "diff nonsense": (("diff", "HEAD", "nonsense"), "no update 'nonsense'"),
    "revert nonsense": (("revert", "nonsense"), "no update 'nonsense'"),
    "checkout nonsense": (("checkout", "nonsense"), "no update 'nonsense'"),
    "merge nonsense": (("merge", "nonsense"), "no update 'nonsense'"),
    "pick nonsense": (("cherry-pick", "nonsense"), "no update 'nonsense'"),
    "branch of nonsense": (("branch", "b", "nonsense"), "no update 'nonsense'"),
    "branch named HEAD": (("branch", "HEAD"), "cannot name"),
    "delete nothing": (("tag", "v9", "-d"), "no tag 'v9'"),
    "delete main": (("branch", "main", "-d"), "checked out"),
    "revert attached": (("revert", "attached"), "no commit"),
    "import nothing": (("import", "none.zip"), "none.zip"),
    "export nonsense": (("export", "{folder}/x.zip", "nonsense"), "no update 'nonsense'"),
    "missing questions": (("diff", "1", "HEAD", "--questions", "none.jsonl"), "none.jsonl"),
    "unknown prompt": (("diff", "1", "HEAD", "--prompt", "x"), "prompt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(run, taught, name):
    (command, *rest), message = MISTAKES[name]
    before = (DeltaStore(taught).journal(), sorted(taught.rglob("*.safetensors")))
    code, out, err = run(command, taught, *(arg.format(folder=taught) for arg in rest))
    assert (code, out) == (2, "")
    assert message in err.strip().split("\n")[-1]
    assert (DeltaStore(taught).journal(), sorted(taught.rglob("*.safetensors"))) == before


@pytest.mark.parametrize("command", ["log", "show", "verify", "gc", "branch", "tag"])
def test_a_folder_that_holds_no_memory_is_named(run, tmp_path, command):
    code, _, err = run(command, tmp_path)
    assert code == 2
    assert "holds no memory_config.json" in err
