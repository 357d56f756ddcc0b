import pytest

from sparsemem.errors import CheckpointError, ConfigError, MissingFileError
from sparsemem.files import write_json
from sparsemem.study.results import best_runs, learning, learning_metric, load_results, method_of, probe_names

from .made_up import result


def test_results_are_read_by_their_name(tmp_path):
    for name in ("b.seed-0", "a.learning_rate-0.1.seed-0"):
        write_json(tmp_path / f"{name}.json", result())
    assert list(load_results(tmp_path)) == ["a.learning_rate-0.1.seed-0", "b.seed-0"]
    assert load_results(tmp_path)["b.seed-0"] == result()
    assert [method_of(name) for name in load_results(tmp_path)] == ["a", "b"]
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"c\.json"):
        load_results(tmp_path)
    with pytest.raises(MissingFileError, match="holds no result"):
        load_results(tmp_path / "none")


def test_learning_is_held_out_f1_where_there_is_one():
    assert learning(result(heldout=0.0, seen=0.9)) == 0.0
    assert learning(result(heldout=None, seen=0.9)) == 0.9
    assert learning(result(heldout=None, seen=None)) is None
    scores = ((0.0, 0.9), (None, 0.9), (None, None))
    metrics = [learning_metric(result(heldout=heldout, seen=seen)) for heldout, seen in scores]
    assert metrics == ["heldout_f1", "seen_f1", None]


def test_probes_of_all_runs_are_named_once():
    runs = {"a": result(probes=("wiki", "nq")), "b": result(probes=("nq", "mmlu"))}
    assert probe_names(runs) == ["wiki", "nq", "mmlu"]


def runs_of(scores):
    """Runs from held-out F1 by (method, learning rate, seed)."""
    return {
        f"{method}.learning_rate-{rate}.seed-{seed}": result(score, learning_rate=rate, seed=seed)
        for (method, rate, seed), score in scores.items()
    }


def test_a_method_is_shown_at_the_setting_with_the_best_mean_over_seeds():
    # The best single run is not at the best setting.
    results = runs_of(
        {
            ("lora", 0.1, 0): 0.5,
            ("lora", 0.1, 1): 0.6,
            ("lora", 0.2, 0): 0.9,
            ("lora", 0.2, 1): 0.1,
            ("full", 0.2, 0): 0.3,
        }
    )
    best = best_runs(results)
    assert list(best) == ["lora", "full"]
    assert [run["config"]["learning_rate"] for run in best["lora"]] == [0.1, 0.1]
    assert [run["seed"] for run in best["lora"]] == [0, 1]
    assert len(best["full"]) == 1


def test_the_setting_is_chosen_on_development_runs():
    results = runs_of({("lora", 0.1, 0): 0.5, ("lora", 0.2, 0): 0.9})
    development = runs_of({("lora", 0.1, 7): 0.8, ("lora", 0.2, 7): 0.7})
    (run,) = best_runs(results, development)["lora"]
    assert run["config"]["learning_rate"] == 0.1
    del results["lora.learning_rate-0.1.seed-0"]
    with pytest.raises(ConfigError, match=r'lora has no run .*"learning_rate": 0\.1'):
        best_runs(results, development)
    with pytest.raises(ConfigError, match=r"full has no run .*no run there either"):
        best_runs(runs_of({("full", 0.1, 0): 0.5}), development)


def test_one_run_twice_is_refused():
    results = runs_of({("lora", 0.1, 0): 0.5, ("full", 0.1, 0): 0.5, ("lora", 0.1, 1): 0.5})
    assert len(best_runs(results)["lora"]) == 2
    results["lora.again"] = results["lora.learning_rate-0.1.seed-1"]
    with pytest.raises(ConfigError, match=r"lora\.again has the setting and seed of another run"):
        best_runs(results)
