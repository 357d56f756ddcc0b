import json
import re

import pytest

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def test_it_writes_one_file_that_fetches_nothing(taught, run, tmp_path):
    out = tmp_path / "new" / "smol.html"
    code, printed, said = run("report", taught, "--out", out)
    assert (code, printed) == (0, "")
    assert said.splitlines()[-1] == f"wrote {out}"
    page = out.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=", page)
    assert re.findall(r'href="([^#][^"]*)"', page) == []
    for part in ("What was learned, and when", "Answers before and after", "Who owns Zed?", "<svg"):
        assert part in page


def test_machines_get_what_the_page_shows(taught, run_json, tmp_path):
    found = run_json("report", taught, "--out", tmp_path / "a.html", "--no-answers")
    assert found["out"] == str(tmp_path / "a.html")
    log = run_json("log", taught)["commits"]
    assert [update["id"] for update in found["updates"]] == [commit["id"] for commit in log]
    assert found["answers"] is None


def test_one_history_gives_one_page(taught, run, tmp_path):
    pages = []
    for name in ("a.html", "b.html"):
        assert run("report", taught, "--out", tmp_path / name)[0] == 0
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_a_memory_that_learned_nothing_has_a_page_too(folder, run, tmp_path):
    assert run("report", folder, "--out", tmp_path / "a.html")[0] == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Nothing yet" in page
    assert "How full the memory is" in page


def test_a_hostile_fact_stays_text(folder, run, tmp_path):
    fact = {"question": f"Who owns {HOSTILE}?", "answer": HOSTILE, "subject": HOSTILE}
    (tmp_path / "f.jsonl").write_text(json.dumps(fact) + "\n", encoding="utf-8")
    taught = run("learn", folder, tmp_path / "f.jsonl", "-m", HOSTILE, "--num-epochs", "1", "--probes")
    assert taught[0] == 0
    assert run("report", folder, "--out", tmp_path / "a.html", "--text", HOSTILE)[0] == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert len(re.findall("<script", page)) == 1
    assert "<img" not in page
    assert page.count("&lt;script&gt;") > 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-questions", "0"], "max_questions=0 is not positive"),
        (["--no-answers", "--text", "Zed"], "need the model"),
        (["--stream", "none.json"], "none.json does not exist"),
        (["--compared", "none"], "none holds no result"),
        (["--questions", "none.jsonl"], "none.jsonl does not exist"),
        (["--prompt", "no"], "no"),
    ],
)
def test_a_mistake_is_one_line(folder, run, tmp_path, argv, message):
    code, printed, said = run("report", folder, "--out", tmp_path / "a.html", *argv)
    assert (code, printed) == (2, "")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "a.html").exists()


def test_a_folder_without_a_memory_is_a_mistake(tmp_path, run):
    code, _, said = run("report", tmp_path, "--out", tmp_path / "a.html")
    assert code == 2
    assert "sparsemem attach" in said


def test_a_page_that_cannot_be_written_is_an_error(folder, run):
    code, _, said = run("report", folder, "--no-answers", "--out", "/proc/none/a.html")
    assert code == 1
    assert "could not write /proc/none/a.html" in said
