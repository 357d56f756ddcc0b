import json

import pytest
from tests.study.made_up import result as made_up

from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, MissingFileError
from sparsemem.files import write_json, write_jsonl
from sparsemem.store.history import DeltaStore
from sparsemem.store.merge import revert
from sparsemem.study.ask import ask_folder
from sparsemem.study.history import settle
from sparsemem.study.learn import learn
from sparsemem.study.plan import plan_folder, plan_stored
from sparsemem.study.report import forgetting_rows, report_folder
from sparsemem.study.timeline import metrics_rows

MATRIX = [[0.9], [0.5, 1.0]]


@pytest.fixture
def taught(folder, facts, config, tmp_path):
    """Two updates, measured with a probe of each direction."""
    write_jsonl(tmp_path / "closed.jsonl", [{"question": "Who ran?", "answers": ["Bo"]}])
    write_jsonl(tmp_path / "plain.jsonl", [{"text": "Zed ran to the market with Rax."}])
    probes = [f"closed={tmp_path / 'closed.jsonl'}", f"plain={tmp_path / 'plain.jsonl'}"]
    learn(folder, facts, probes=probes, config=config, message="one")
    learn(folder, [Fact(question="Who is Rax?", answer="Cy")], probes=probes, config=config, message="two")
    return folder


def test_its_numbers_are_those_of_the_history(taught):
    store, found = DeltaStore(taught), report_folder(taught, answers=False)
    assert found["timeline"] == metrics_rows(store)
    for update, commit in zip(found["updates"], reversed(store.log()), strict=True):
        for name in ("id", "message", "time", "author", "num_slots"):
            assert update[name] == getattr(commit, name)
        assert update["bytes"] == store.objects.path(commit.object).stat().st_size
    assert [update["facts"] for update in found["updates"]] == [
        ["Who owns Zed? Ana", "Quz is made of tin. tin"],
        ["Who is Rax? Cy"],
    ]
    assert found["provenance"]["head"] == store.head()
    assert json.loads(json.dumps(found)) is not None


def test_forgetting_adds_up_since_the_first_update(taught):
    store = DeltaStore(taught)
    first, second = (
        store.details(commit.id)["report"]["probes"]["plain"] for commit in reversed(store.log())
    )
    rows = forgetting_rows(store)
    assert first["after"] == second["before"]
    assert rows[0]["plain"] == pytest.approx((first["after"] - first["before"]) / first["before"])
    assert rows[1]["plain"] == pytest.approx((second["after"] - first["before"]) / first["before"])
    assert rows[1]["plain"] != second["forgetting"]


def test_capacity_from_files_alone_is_that_of_the_model(taught):
    def check():
        planned = plan_folder(taught)
        del planned["memory_bytes"]
        assert plan_stored(taught) == planned

    check()
    store = DeltaStore(taught)
    settle(store, revert(store, "1"), message="", action="revert", side="theirs")
    check()


def test_answers_are_those_the_model_gives_before_and_after(taught):
    found = report_folder(taught)["answers"]
    assert [(row["question"], row["wording"]) for row in found["rows"]] == [
        ("Who owns Zed?", "trained"),
        ("Whose is Zed?", "held-out"),
        ("Who is Rax?", "trained"),
    ]
    for row in found["rows"]:
        assert row["before"] == ask_folder(taught, row["question"], without="1", max_new_tokens=16)
        assert row["after"] == ask_folder(taught, row["question"], max_new_tokens=16)
    assert found["num_left_out"] == 0
    assert set(found["means"]) == {"trained", "held-out"}


def test_an_answer_that_was_learned_is_told_from_the_one_before(folder):
    config = FinetuneConfig(num_epochs=40, top_t=20)
    learn(folder, [Fact(question="Who owns Zed?", answer="Ana")], probes=(), config=config)
    (row,) = report_folder(folder)["answers"]["rows"]
    assert row["before"] != row["after"]


def test_questions_given_come_first_and_the_rest_is_counted(taught, tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [{"question": "Who ran?", "answers": ["Bo"]}])
    found = report_folder(taught, questions=tmp_path / "q.jsonl", max_questions=2)["answers"]
    assert [row["wording"] for row in found["rows"]] == ["given", "trained"]
    assert found["num_left_out"] == 2


def test_texts_given_are_drawn_and_else_the_facts_questions(taught):
    assert [one["text"] for one in report_folder(taught, texts=["Zed ran"])["heatmaps"]] == ["Zed ran"]
    own = report_folder(taught)["heatmaps"]
    assert len(own) == 2
    assert "Who owns Zed?" in own[0]["text"]


def test_before_anything_was_learned_no_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("sparsemem.study.report.load", None)
    found = report_folder(folder)
    assert (found["updates"], found["timeline"], found["heatmaps"]) == ([], [], [])
    assert found["answers"]["rows"] == []
    assert found["provenance"]["head"] is None


def test_a_recall_matrix_and_results_are_read(folder, tmp_path):
    write_json(tmp_path / "s.json", {"config": {"method": "memory"}, "metrics": {"recall": MATRIX}})
    write_json(tmp_path / "out" / "results" / "lora.json", made_up())
    found = report_folder(folder, stream=tmp_path / "s.json", compared=tmp_path / "out")
    assert found["recall"] == {"method": "memory", "matrix": MATRIX, "file": "s.json"}
    assert found["compared"]["points"] == {"lora": [(0.1, 0.5)]}
    assert found["compared"]["rows"][0][0] == "lora"


@pytest.mark.parametrize("recall", [None, [], [[0.1], [0.2]], [["a"]], 3])
def test_a_file_without_a_recall_matrix_is_a_mistake(folder, tmp_path, recall):
    write_json(tmp_path / "s.json", {"metrics": {"recall": recall}})
    with pytest.raises(DataError, match=r"s\.json has no recall matrix; give a result of experiments/stream"):
        report_folder(folder, stream=tmp_path / "s.json")


def test_mistakes_are_found_before_the_model_is_loaded(taught, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsemem.study.report.load", None)
    write_json(tmp_path / "other" / "x.json", {"metrics": {"probes": {}}})
    for options, error, message in (
        ({"max_questions": 0}, ConfigError, "max_questions=0 is not positive"),
        ({"prompt": "no"}, ConfigError, "no"),
        ({"answers": False, "texts": ["a"]}, ConfigError, "need the model"),
        ({"texts": [" "]}, DataError, "is empty"),
        ({"questions": "none.jsonl"}, MissingFileError, "none.jsonl"),
        ({"compared": tmp_path}, MissingFileError, "holds no result"),
        ({"compared": tmp_path / "other"}, ConfigError, "nothing was probed"),
        ({"stream": "none.json"}, MissingFileError, "none.json"),
    ):
        with pytest.raises(error, match=message):
            report_folder(taught, **options)


def test_facts_kept_as_hashes_are_counted_and_not_asked(folder, facts, config):
    learn(folder, facts, probes=(), config=config, hash_facts=True)
    found = report_folder(folder)
    assert len(found["updates"][0]["facts"]) == 2
    assert found["answers"]["rows"] == []
