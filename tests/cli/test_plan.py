import json

from sparsemem.cli.app import main


def test_people_get_a_table_and_machines_json(taught, capsys):
    assert main(["plan", str(taught)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("written", "on disk", "in memory", "updates: 1, facts in them: 2", "recommendation: "):
        assert part in err
    assert main(["plan", str(taught), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_updates"] == 1
    assert result["pools"]["layer_1"]["num_written"] > 0


def test_how_much_fires_is_measured_on_a_background(taught, inputs, capsys):
    assert main(["plan", str(taught), "--background", str(inputs / "background.jsonl")]) == 0
    assert "not measured" not in capsys.readouterr().err
    assert main(["plan", str(taught), "--background", "none.txt"]) == 2
    assert "none.txt does not exist" in capsys.readouterr().err


def test_a_folder_without_a_memory_is_a_mistake(tmp_path, capsys):
    assert main(["plan", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "sparsemem attach" in err
