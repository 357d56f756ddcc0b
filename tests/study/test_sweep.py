import dataclasses
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from sparsemem.config import to_json
from sparsemem.errors import ConfigError, DataError, MissingFileError, SparsememError
from sparsemem.files import read_json, write_json, write_jsonl
from sparsemem.study import sweep
from sparsemem.study.provenance import data_sha
from sparsemem.study.sweep import check, expand, run_all

FULL = {"method": "full", "num_epochs": 1}


@pytest.fixture
def full(spec):
    """The quickest spec."""
    return dataclasses.replace(spec, config=FULL, background=())


@pytest.fixture
def sweep_here(tmp_path):
    # As many at a time as there are cores, so that each has one thread.
    common = {"jobs": os.cpu_count(), "cache": tmp_path / "cache"}
    return lambda specs, **options: run_all(specs, tmp_path / "results", **{**common, **options})


@pytest.fixture
def quick(monkeypatch):
    """Runs that measure nothing; gives how many there were at a time."""
    processes, at_a_time = [], []

    def start(spec, result, *_args):
        write_json(result, {"config": spec.described(), "data_sha": data_sha(spec.files)})
        processes.append(subprocess.Popen(["sleep", "0.2"]))
        at_a_time.append(sum(process.poll() is None for process in processes))
        return processes[-1]

    monkeypatch.setattr(sweep, "_start", start)
    return at_a_time


def rewrite(path, **changes):
    write_json(path, {**read_json(path), **changes})


def test_a_grid_multiplies_runs_and_names_them(full):
    grid = {"seed": [0, 1], "learning_rate": [1e-4, 0.001], "peft": [{"r": 2}]}
    specs = expand("full", {**to_json(full), "grid": grid})
    assert list(specs) == [
        f"full.learning_rate-{rate}.peft-r-2.seed-{seed}" for rate in ("0.0001", "0.001") for seed in (0, 1)
    ]
    spec = specs["full.learning_rate-0.001.peft-r-2.seed-1"]
    assert spec.config == {**FULL, "learning_rate": 0.001, "peft": {"r": 2}, "seed": 1}
    assert dataclasses.replace(spec, config=FULL) == full
    assert expand("full", to_json(full)) == {"full": full}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("a.b", {}, "run 'a.b' is no name"),
        ("a", {"grid": {"seed": 1}}, "grid seed=1 is no list"),
        ("a", {"grid": {"seed": []}}, "is no list"),
        ("a", {"grid": {"seed": [0, 0]}}, "two runs are named a.seed-0"),
        ("a", {"grid": {"sead": [0]}}, "unknown option 'sead'"),
        ("a", {"sead": 0}, "a: unknown option 'sead'"),
        ("a", {"grid": {"learning_rate": ["1e-4x"]}}, "wrong type"),
    ],
    ids=str,
)
def test_a_grid_that_cannot_work_is_named(full, name, options, reason):
    with pytest.raises(ConfigError, match=reason):
        expand(name, {**to_json(full), **options})


def test_every_run_has_a_process_a_result_and_an_end_of_its_own(spec, full, sweep_here, tmp_path, capsys):
    diverging = dataclasses.replace(full, config={**FULL, "learning_rate": 1e30, "num_epochs": 3})
    failed = sweep_here({"wild": diverging, "memory": spec, "full": full})
    assert list(failed) == ["wild"]
    assert failed["wild"].startswith("error: the loss is")
    told = capsys.readouterr().err
    assert f"/3] wild: {failed['wild']}\n" in told
    assert "/3] full: done\n" in told
    results = {path.stem: read_json(path) for path in (tmp_path / "results").iterdir()}
    methods = {name: run["config"]["method"] for name, run in results.items()}
    assert methods == {"memory": "memory", "full": "full"}
    assert {run["hardware"]["threads"] for run in results.values()} == {1}
    (kept,) = (tmp_path / "cache" / "runs").glob("*/full.json")
    assert read_json(kept) == to_json(full)


def test_no_more_runs_at_a_time_than_asked_for(full, sweep_here, quick):
    assert sweep_here({f"run-{number}": full for number in range(5)}, jobs=2) == {}
    assert max(quick) == 2


def test_what_has_a_result_is_not_run_again(full, sweep_here, tmp_path, quick):
    sweep_here({"full": full})
    path = tmp_path / "results" / "full.json"
    rewrite(path, marked=True)
    assert sweep_here({"full": full, "other": full}) == {}
    assert read_json(path)["marked"]
    assert (tmp_path / "results" / "other.json").exists()


def test_a_result_of_another_run_is_not_taken_for_this_one(full, sweep_here, tmp_path, quick):
    sweep_here({"full": full})
    path = tmp_path / "results" / "full.json"
    longer = dataclasses.replace(full, config={**FULL, "num_epochs": 2})
    with pytest.raises(ConfigError, match=r"full\.json was run with num_epochs=1, not 2"):
        sweep_here({"full": longer})
    # An option that came later has no value in an older result.
    config = read_json(path)["config"]
    rewrite(path, config={name: value for name, value in config.items() if name != "momentum"})
    assert sweep_here({"full": full}) == {}
    write_jsonl(tmp_path / "facts.jsonl", [{"question": "Who?", "answer": "Ana"}])
    with pytest.raises(ConfigError, match="on other data"):
        sweep_here({"full": full})


def test_the_same_names_elsewhere_are_the_same_run_and_others_are_not(full, sweep_here, tmp_path, quick):
    sweep_here({"full": full})
    path = tmp_path / "results" / "full.json"
    config = read_json(path)["config"]

    def result_of(**places):
        rewrite(path, config={**config, **places})
        return sweep_here({"full": full})

    moved = {
        "model": f"/elsewhere/{Path(full.model).name}",
        "facts": "/elsewhere/facts.jsonl",
        "probes": [f"{name}=/elsewhere/{name}.jsonl" for name in ("closed", "plain")],
    }
    assert result_of(**moved) == {}
    for other in (
        {"model": "some/other"},
        {"facts": "some/facts"},
        {"probes": ["open=closed.jsonl", "plain=plain.jsonl"]},
        {"probes": ["closed=closed.jsonl"]},
        {"background": ["some/text"]},
    ):
        with pytest.raises(ConfigError, match=f"was run with {next(iter(other))}="):
            result_of(**other)


def test_results_in_folders_of_the_same_name_have_logs_of_their_own(tmp_path):
    folders = {sweep._log_folder(tmp_path / name / "facts" / "results", tmp_path) for name in "ab"}
    folders.add(sweep._log_folder(tmp_path / "a" / "facts" / "again", tmp_path))
    assert len(folders) == 3


def test_a_run_that_is_killed_is_told_with_its_log(full, sweep_here, tmp_path, monkeypatch):
    """As the kernel does when memory runs out: no last words."""

    def start(*args):
        process = original(*args)
        process.kill()
        return process

    original = sweep._start
    monkeypatch.setattr(sweep, "_start", start)
    failed = sweep_here({"full": full})
    (log,) = (tmp_path / "cache" / "runs").glob("*/full.log")
    assert failed == {"full": f"ended by SIGKILL; see {log}"}


@pytest.fixture
def ctrl_c():
    """Ctrl-C works even where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_runs_and_leaves_nothing_half_written(
    ctrl_c, full, sweep_here, tmp_path, monkeypatch
):
    def start(*args):
        processes.append(original(*args))
        return processes[-1]

    def interrupt():
        log = sweep._log_folder(tmp_path / "results", tmp_path / "cache") / "endless.log"
        while not (log.exists() and "learn 4 facts" in log.read_text()):
            time.sleep(0.05)
        # As a terminal does, to all of them.
        os.kill(os.getpid(), signal.SIGINT)
        processes[0].send_signal(signal.SIGINT)

    processes = []
    original = sweep._start
    monkeypatch.setattr(sweep, "_start", start)
    monkeypatch.setattr(sweep, "GRACE_SECONDS", 60.0)
    endless = dataclasses.replace(full, config={**FULL, "num_epochs": 10**6})
    killer = threading.Thread(target=interrupt, daemon=True)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        sweep_here({"endless": endless})
    killer.join()
    assert [process.returncode for process in processes] == [130]
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"config": {"method": "lorra"}}, ConfigError),
        ({"model": "none.gguf"}, MissingFileError),
        ({"model": "./none"}, MissingFileError),
        ({"facts": "none.jsonl"}, MissingFileError),
        ({"num_facts": 99}, DataError),
        ({"probes": ("nameless",)}, ConfigError),
        ({"background": ("none.txt",)}, MissingFileError),
    ],
    ids=str,
)
def test_a_mistake_is_found_before_anything_runs(spec, sweep_here, tmp_path, options, error):
    wrong = dataclasses.replace(spec, **options)
    with pytest.raises(error):
        check([spec, wrong])
    with pytest.raises(error):
        sweep_here({"right": spec, "wrong": wrong})
    assert not (tmp_path / "cache").exists()


def test_at_least_one_run_at_a_time(full, sweep_here):
    with pytest.raises(SparsememError, match="jobs=0"):
        sweep_here({"full": full}, jobs=0)
