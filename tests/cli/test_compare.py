import json
import os
import sys

import pytest

from sparsemem.cli.app import build_parser, main
from sparsemem.cli.compare import grids
from sparsemem.config import DEFAULT_LEARNING_RATES
from sparsemem.files import read_json, write_json
from sparsemem.study.run import perform
from sparsemem.study.sweep import expand

from .conftest import SHAPE

MEMORY = SHAPE[: SHAPE.index("--num-tokens")]
QUICK = ["--num-epochs", "1", "--top-t", "6"]


@pytest.fixture
def argv(model_folder, inputs, probes, tmp_path):
    background = ["--background", inputs / "background.jsonl"]
    out = ["--out", tmp_path / "out"]
    return ["compare", model_folder, inputs / "facts.jsonl", *out, *background, *probes, *MEMORY, *QUICK]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command; returns its exit code, what it printed and what it said."""
    monkeypatch.setenv("COLUMNS", "5000")

    def run(*argv):
        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def in_process(monkeypatch):
    """Runs without processes of their own; those named here fail."""
    failing = []

    def run_all(specs, results, *, jobs, cache):
        for name, spec in specs.items():
            if name not in failing:
                write_json(results / f"{name}.json", perform(spec, cache))
        return dict.fromkeys(failing, "error: it burned")

    monkeypatch.setattr("sparsemem.study.sweep.run_all", run_all)
    return failing


def test_methods_are_run_shown_drawn_and_not_run_again(run, argv, tmp_path):
    options = ["--methods", "memory,full", "--learning-rate", "full=1e-3", "--jobs", os.cpu_count(), "--json"]
    code, out, err = run(*argv, *options)
    assert code == 0, err
    report = json.loads(out)
    names = {"memory.seed-0", "full.learning_rate-0.001.seed-0"}
    assert set(report) == {"out", "failed", "metrics", "plots"}
    assert set(report["metrics"]) == names
    assert report["failed"] == {}
    folder = tmp_path / "out"
    assert report["plots"] == [str(folder / "pareto.png"), str(folder / "pareto.svg")]
    assert all((folder / name).is_file() for name in ("pareto.png", "pareto.svg"))
    results = {path.stem: read_json(path) for path in (folder / "results").iterdir()}
    assert {name: result["metrics"] for name, result in results.items()} == report["metrics"]
    assert {name: result["config"]["method"] for name, result in results.items()} == {
        "memory.seed-0": "memory",
        "full.learning_rate-0.001.seed-0": "full",
    }
    for column in ("held-out F1", "closed kept", "plain perplexity, change", "numbers changed"):
        assert column in err
    assert run(*argv, *options)[1] == out


def parsed(argv, *options):
    return grids(build_parser().parse_args([str(word) for word in (*argv, *options)]))


def test_every_method_is_run_at_its_learning_rates_and_all_seeds(argv, inputs):
    options = ["--methods", "memory,lora", "--learning-rate", "lora=1e-4,2e-4", "--seeds", "3,4"]
    runs = parsed(argv, *options, "--peft", "r=2", "--prompt", "chat")
    specs = {name: spec for method in runs for name, spec in expand(method, runs[method]).items()}
    assert list(specs) == [
        "memory.seed-3",
        "memory.seed-4",
        "lora.learning_rate-0.0001.seed-3",
        "lora.learning_rate-0.0001.seed-4",
        "lora.learning_rate-0.0002.seed-3",
        "lora.learning_rate-0.0002.seed-4",
    ]
    spec = specs["lora.learning_rate-0.0002.seed-4"]
    config = spec.finetune_config
    assert (config.method, config.lr, config.seed, config.num_epochs) == ("lora", 2e-4, 4, 1)
    assert (config.peft, spec.prompt, spec.memory_config.num_keys) == ({"r": 2}, "chat", 8)
    assert specs["memory.seed-3"].finetune_config.lr == DEFAULT_LEARNING_RATES["memory"]
    assert [probe.partition("=")[0] for probe in spec.probes] == ["closed", "choice", "plain"]


def test_built_in_questions_are_probed_by_default(model_folder):
    (probe,) = parsed(["compare", model_folder, "facts.jsonl", "--out", "out"])["full"]["probes"]
    assert probe.startswith("general_knowledge=")
    assert parsed(["compare", model_folder, "f", "--out", "o", "--probes"])["full"]["probes"] == []


def test_a_run_that_failed_leaves_the_others_and_exit_code_1(run, argv, in_process):
    in_process.append("full.seed-0")
    code, out, err = run(*argv, "--methods", "memory,full", "--json")
    assert code == 1
    report = json.loads(out)
    assert report["failed"] == {"full.seed-0": "error: it burned"}
    assert set(report["metrics"]) == {"memory.seed-0"}
    assert err.strip().splitlines()[-1].startswith("error: 1 of 2 runs failed")
    in_process.append("memory.seed-0")
    code, out, _ = run(*argv, "--methods", "memory,full", "--json")
    assert (code, json.loads(out)["metrics"], json.loads(out)["plots"]) == (1, {}, [])


def test_results_of_other_options_in_the_folder_are_not_mixed_in(run, argv, in_process):
    run(*argv, "--methods", "full", "--seeds", "0,1")
    code, out, _ = run(*argv, "--methods", "full", "--seeds", "1", "--json")
    assert code == 0
    assert set(json.loads(out)["metrics"]) == {"full.seed-1"}


def test_without_matplotlib_or_probes_there_is_a_table_and_one_line_more(run, argv, in_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(*argv, "--methods", "full", "--json")
    assert (code, json.loads(out)["plots"]) == (0, [])
    assert "no plot: a picture needs matplotlib; pip install 'sparsemem[study]'" in err
    code, out, err = run(*argv, "--methods", "full", "--probes", "--json")
    assert (code, json.loads(out)["plots"]) == (0, [])
    assert "no plot: nothing was probed for forgetting; give probes" in err


def test_facts_without_questions_have_a_table_and_no_plot(run, argv, in_process, tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"statement": "Quz is made of tin."}\n')
    argv[2] = tmp_path / "documents.jsonl"
    code, out, err = run(*argv, "--methods", "full", "--json")
    assert (code, json.loads(out)["plots"]) == (0, [])
    assert "no plot: no run has F1 of facts beside probe 'closed'" in err


def test_scipy_is_missed_before_anything_runs(run, argv, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    code, _, err = run(*argv, "--methods", "full", "--seeds", "0,1")
    assert code != 0
    assert "an interval over seeds needs scipy" in err
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "an unknown method": (["--methods", "memory,lorra"], "method='lorra' is unknown"),
    "no method": (["--methods", ""], "run '' is no name"),
    "a rate of no method": (["--learning-rate", "1e-4"], "names no method; write lora=1e-4,2e-4"),
    "a rate of another method": (["--learning-rate", "ia3=1e-4"], "none of the methods memory, lora, full"),
    "a rate that is none": (["--learning-rate", "lora=fast"], "'fast' are no numbers"),
    "a negative rate": (["--learning-rate", "lora=-1"], "learning_rate=-1.0 is not positive"),
    "a seed that is none": (["--seeds", "a"], "--seeds 'a' are no numbers"),
    "a seed twice": (["--seeds", "1,1"], "two runs are named memory.seed-1"),
    "no jobs": (["--jobs", "0"], "jobs=0 is not positive"),
    "a missing background": (["--background", "none.txt"], "none.txt does not exist"),
    "missing probes": (["--probes", "p=none.jsonl"], "none.jsonl does not exist"),
    "a bad option": (["--top-t", "0"], "top_t=0 is not positive"),
    "an unknown prompt": (["--prompt", "poem"], "prompt='poem' is unknown"),
    "too many reads": (["--top-k", "65"], "top_k=65 exceeds the 64 slots"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_anything_runs(run, argv, tmp_path, name):
    options, reason = MISTAKES[name]
    code, out, err = run(*argv, *options)
    assert (code, out) == (2, "")
    assert reason in err
    assert not (tmp_path / "out").exists()


def test_memory_needs_background(run, model_folder, inputs, tmp_path):
    code, _, err = run("compare", model_folder, inputs / "facts.jsonl", "--out", tmp_path / "out")
    assert code == 2
    assert "method='memory' needs background text" in err


def test_missing_facts_and_models_are_named(run, argv, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place, name in ((2, "none.jsonl"), (1, "none.gguf"), (1, "no-such-owner/no-such-model")):
        code, _, err = run(*argv[:place], name, *argv[place + 1 :])
        assert code == 2
        assert name in err
