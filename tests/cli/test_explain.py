import json

import pytest

from sparsemem.cli.app import main


def explain(capsys, *argv):
    capsys.readouterr()
    code = main(["explain", *map(str, argv)])
    return code, *capsys.readouterr()


def test_people_get_a_view_on_stderr_and_machines_json_on_stdout(taught, capsys):
    code, out, err = explain(capsys, taught, "Who owns Zed?", "--question")
    assert (code, out) == (0, "")
    for part in ("tokens that fire", "updates", "without 1", "Something learned fires here"):
        assert part in err
    code, out, _ = explain(capsys, taught, "Who owns Zed?", "--question", "--json", "--top", "2")
    assert code == 0
    result = json.loads(out)
    assert result["fires"]
    assert len(result["next"]) == 2
    assert [update["update"] for update in result["updates"]] == ["1"]


def test_before_anything_was_learned_nothing_fires(folder, capsys):
    code, _, err = explain(capsys, folder, "Who owns Zed?")
    assert code == 0
    assert "Nothing learned fires here" in err
    assert "tokens that fire" not in err


def test_hostile_text_is_shown_as_it_is(taught, capsys, tmp_path):
    text = "[bold]<script>\x1b[31m Zed"
    code, _, err = explain(capsys, taught, text, "--html", tmp_path / "new" / "page.html")
    assert code == 0
    assert "[bold]<script>" in err.replace("[1]", "").replace("\n", "")
    assert "\x1b" not in err
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;" in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{folder}", " "], "give a text"),
        (["{folder}", "Zed", "--top", "0"], "top=0 is not positive"),
        (["{folder}", "Zed", "--facts", "none.jsonl"], "none.jsonl does not exist"),
        (["{folder}/none", "Zed"], "sparsemem attach"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, tmp_path, argv, message):
    argv = [word.format(folder=folder) for word in argv]
    code, out, err = explain(capsys, *argv, "--html", tmp_path / "page.html")
    assert (code, out) == (2, "")
    assert message in err.replace("\n", "")
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_an_error(taught, capsys):
    code, _, err = explain(capsys, taught, "Zed", "--html", "/proc/none/page.html")
    assert code == 1
    assert "could not write /proc/none/page.html" in err
