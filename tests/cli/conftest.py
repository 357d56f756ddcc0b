"""A tiny model and memory folders on disk, made once by the command and copied for each test."""

import json
import shutil

import pytest

from sparsemem.cli.app import main

SHAPE = ["--layers", "1", "--num-keys", "8", "--num-heads", "2", "--top-k", "4", "--query-dim", "4"]
SHAPE += ["--num-tokens", "1500", "--num-documents", "20"]


def object_of(folder):
    (path,) = (folder / "objects").rglob("*.safetensors")
    return path


@pytest.fixture
def inputs(tmp_path, texts):
    """A folder of what a user has: background, facts and probes."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    rows = {
        "background.jsonl": [{"text": text} for text in texts],
        "facts.jsonl": [
            {"question": "Who owns Zed?", "answer": "Ana", "heldout_questions": ["Whose is Zed?"]},
            {"statement": "Quz is made of tin.", "answer": "tin", "subject": "Quz"},
        ],
        "closed.jsonl": [{"question": "Who ran?", "answers": ["Bo"]}],
        "choice.jsonl": [{"question": "Who ran?", "choices": ["Bo", "Ana"], "answer": 0}],
        "plain.jsonl": [{"text": text} for text in texts[:3]],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return folder


@pytest.fixture
def probes(inputs):
    return ["--probes", *(f"{kind}={inputs / kind}.jsonl" for kind in ("closed", "choice", "plain"))]


@pytest.fixture
def folder(made_once, model_folder, inputs, tmp_path, tmp_path_factory, capsys):
    """A memory folder as attach leaves it."""
    if "attached" not in made_once:
        out = tmp_path_factory.mktemp("memory") / "memory"
        background = str(inputs / "background.jsonl")
        code = main(["attach", str(model_folder), "--background", background, "--out", str(out), *SHAPE])
        assert code == 0
        capsys.readouterr()
        made_once["attached"] = out
    return shutil.copytree(made_once["attached"], tmp_path / "memory")


@pytest.fixture
def taught(made_once, folder, inputs, tmp_path, tmp_path_factory, capsys):
    """The same folder with one update."""
    if "taught" not in made_once:
        assert main(["learn", str(folder), str(inputs / "facts.jsonl"), "--num-epochs", "1", "--probes"]) == 0
        capsys.readouterr()
        made_once["taught"] = shutil.copytree(folder, tmp_path_factory.mktemp("taught") / "memory")
    return shutil.copytree(made_once["taught"], tmp_path / "taught")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command; returns its exit code, what it printed and what it said."""
    # So wide that no message is folded here; folding has a test of its own.
    monkeypatch.setenv("COLUMNS", "5000")

    def run(*argv):
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def run_json(run):
    def run_json(*argv):
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        value = json.loads(out)
        assert isinstance(value, dict)
        return value

    return run_json
