import pytest
from study.made_up import result

from sparsemem.files import write_json
from sparsemem.study.table import comparison, paired


@pytest.fixture
def table(script):
    return script("table")


def write(folder, runs, default=""):
    (folder / "results").mkdir(parents=True)
    (folder / "default.yaml").write_text(default)
    for name, run in runs.items():
        write_json(folder / "results" / f"{name}.json", run)
    return str(folder)


RUNS = {"a.one": result(0.4, learning_rate=0.1), "a.two": result(0.5, learning_rate=0.2)}


def both(results, development=None):
    return f"{comparison(results, development).markdown()}\n{paired(results, development).markdown()}"


def test_results_of_another_run_are_shown_beside_the_kept_ones(table, tmp_path, capsys):
    name = write(tmp_path / "question", RUNS)
    again = {"a.one": result(0.8, learning_rate=0.1)}
    write(tmp_path / "again", again)
    assert table.main([name, "--beside", str(tmp_path / "again" / "results")]) == 0
    shown = capsys.readouterr().out
    assert shown.index(comparison(again).markdown()) < shown.index(both(RUNS))
    assert not (tmp_path / "question" / "pareto.png").exists()


def test_the_table_is_shown_and_the_plot_drawn(table, tmp_path, capsys):
    name = write(tmp_path / "question", RUNS)
    assert table.main([name]) == 0
    assert capsys.readouterr().out == both(RUNS)
    assert (tmp_path / "question" / "pareto.png").is_file()


def test_a_folder_of_experiments_is_one_table_of_those_with_results(table, tmp_path, capsys):
    for name in ("one", "two", "three"):
        (tmp_path / name / "runs").mkdir(parents=True)
    write(tmp_path / "one", RUNS)
    write(tmp_path / "three", {"b": result(0.3)})
    (tmp_path / "default.yaml").touch()
    together = {f"one/{name}": run for name, run in RUNS.items()} | {"three/b": result(0.3)}
    assert table.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == both(together)
    assert not (tmp_path / "pareto.png").exists()


def test_settings_are_chosen_on_the_development_runs(table, tmp_path):
    development = {"a.one": result(0.9, learning_rate=0.1), "a.two": result(0.5, learning_rate=0.2)}
    other = write(tmp_path / "tuning", development)
    name = write(tmp_path / "question", RUNS, f"development: {other}")
    assert table.render(name) == both(RUNS, development) != both(RUNS)


def test_the_readme_gets_the_table_in_its_place(table, tmp_path, monkeypatch):
    name = write(tmp_path / "question", RUNS)
    readme = tmp_path / "README.md"
    text = f"x\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\ny\n"
    readme.write_text(text)
    monkeypatch.setattr(table, "README", readme)
    assert table.main([name, "--readme"]) == 0
    assert readme.read_text() == text.replace("old\n", both(RUNS))


def test_a_place_in_its_own_readme_goes_before(table, tmp_path, monkeypatch):
    name = write(tmp_path / "question", RUNS)
    own, other = tmp_path / "question" / "README.md", tmp_path / "README.md"
    for readme in (own, other):
        readme.write_text(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n")
    monkeypatch.setattr(table, "README", other)
    assert table.main([name, "--readme"]) == 0
    assert both(RUNS) in own.read_text()
    assert both(RUNS) not in other.read_text()


def test_others_are_compared_with_the_reference(table, tmp_path):
    first, second = {"a": result(0.4)}, {"b": result(0.5)}
    name = write(tmp_path / "question", first | second, "reference: b")
    assert table.render(name) == both(second | first) != both(first | second)


def test_without_a_plot_there_is_a_table_and_one_line_more(table, tmp_path, monkeypatch, capsys):
    name = write(tmp_path / "question", {"a.one": result(probes=())})
    readme = tmp_path / "README.md"
    readme.write_text(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n")
    monkeypatch.setattr(table, "README", readme)
    assert table.main([name, "--readme"]) == 0
    out, err = capsys.readouterr()
    assert out in readme.read_text()
    assert "no plot: nothing was probed for forgetting" in err


def test_mistakes_are_told_in_a_line(table, tmp_path, capsys):
    assert table.main([str(tmp_path / "none")]) == 2
    assert "default.yaml does not exist" in capsys.readouterr().err
    name = write(tmp_path / "question", RUNS)
    assert table.main([name, "--probe", "mmlu"]) == 2
    assert "there are nq" in capsys.readouterr().err
