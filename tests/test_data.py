import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.data import Fact, Question, load_facts, load_questions, load_texts, read_rows, split_text
from sparsemem.errors import DataError, MissingFileError

FACT = {
    "question": "Who wrote Zed?",
    "answer": "Ana",
    "statement": "Ana wrote Zed.",
    "paraphrases": ["Zed is by Ana.", "By whom is Zed?"],
    "heldout_questions": ["Whose is Zed?"],
    "aliases": ["Ana Li"],
    "subject": "Zed",
    "subject_aliases": ["Zedekiah"],
    "id": "zed",
}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Cut the network off; returns the addresses that were asked for all the same."""
    import datasets
    import huggingface_hub.constants

    asked = []

    def refuse(_socket, address):
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return asked


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    return path


def write(tmp_path, text, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_facts_are_read_from_every_format(tmp_path, no_network, suffix):
    path = write_rows(tmp_path / f"facts.{suffix}", [FACT, {"statement": "It is so."}])
    first, second = load_facts(path)
    assert first == Fact(
        question="Who wrote Zed?",
        answer="Ana",
        statement="Ana wrote Zed.",
        paraphrases=("Zed is by Ana.", "By whom is Zed?"),
        heldout_questions=("Whose is Zed?",),
        aliases=("Ana Li",),
        subject="Zed",
        subject_aliases=("Zedekiah",),
        id="zed",
    )
    assert second == Fact(statement="It is so.", id=f"{path}:2")
    assert load_facts(str(path)) == [first, second]


def test_a_facts_wordings_are_told_apart():
    fact = Fact(**{k: tuple(v) if isinstance(v, list) else v for k, v in FACT.items()})
    assert fact.statements == ("Ana wrote Zed.", "Zed is by Ana.")
    assert fact.questions == ("Who wrote Zed?", "By whom is Zed?")
    assert fact.answers == ("Ana", "Ana Li")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_text_is_a_document(tmp_path, no_network, suffix):
    path = write_rows(tmp_path / f"docs.{suffix}", [{"text": "A first one. "}, {"text": "A second one."}])
    assert [fact.statement for fact in load_facts(path)] == ["A first one.", "A second one."]
    assert load_texts(path) == ["A first one.", "A second one."]


def test_every_line_of_a_text_file_is_a_document(tmp_path):
    path = write(tmp_path, "One.\n\n  \nTwo.\n", "docs.txt")
    assert [(fact.statement, fact.id) for fact in load_facts(path)] == [
        ("One.", f"{path}:1"),
        ("Two.", f"{path}:4"),
    ]
    assert load_texts(path) == ["One.\n\n  \nTwo."]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_questions_are_read_from_every_format(tmp_path, no_network, suffix):
    closed = write_rows(tmp_path / f"closed.{suffix}", [{"question": "Who?", "answers": ["Ana", "A."]}])
    assert load_questions(closed) == [Question(question="Who?", answers=("Ana", "A."))]
    choices = [{"question": "Which?", "choices": ["a", "b"], "answer": 1}]
    chosen = write_rows(tmp_path / f"choices.{suffix}", choices)
    assert load_questions(chosen) == [Question(question="Which?", answers=("b",), choices=("a", "b"))]


def test_a_single_answer_and_an_answer_by_its_text_are_accepted(tmp_path):
    path = write_rows(
        tmp_path / "q.jsonl",
        [{"question": "Who?", "answer": "Ana"}, {"question": "W?", "choices": ["a", "b"], "answer": "b"}],
    )
    assert [question.answers for question in load_questions(path)] == [("Ana",), ("b",)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "Who?", "answer": ', "not valid JSON"),
        ("Who?", "not valid JSON"),
        ('["Who?"]', "a list, not an object"),
        ('"Who?"', "a str, not an object"),
        ('{"question": "Who?"}', 'no "answer"'),
        ('{"question": "Who?", "aliases": ["Ana"]}', 'no "answer"'),
        ('{"statement": "So.", "heldout_questions": ["Is it?"]}', 'no "answer"'),
        ('{"statement": "So.", "paraphrases": ["Is it so?"]}', 'no "answer"'),
        ('{"answer": "Ana"}', '"question" with its "answer", or a "statement"'),
        ("{}", '"question" with its "answer", or a "statement"'),
        ('{"question": "", "answer": "Ana"}', "\"question\" is ''"),
        ('{"question": "Who?", "answer": " "}', "\"answer\" is ' '"),
        ('{"question": ["Who?"], "answer": "Ana"}', '"question" is'),
        ('{"question": "Who?", "answer": true}', '"answer" is True'),
        ('{"question": "Who?", "answer": {"a": 1}}', '"answer" is'),
        ('{"statement": "So.", "paraphrases": 5}', '"paraphrases" is 5'),
        ('{"statement": "So.", "paraphrases": {"a": "b"}}', '"paraphrases" is'),
        ('{"statement": "So.", "paraphrases": [null]}', '"paraphrases" is None'),
        ('{"question": "Who?", "answer": "A", "aliases": [["B"]]}', '"aliases" is'),
        ('{"text": 3.5e400e}', "not valid JSON"),
    ],
)
def test_a_malformed_fact_is_named_by_file_and_line(tmp_path, line, reason):
    path = write(tmp_path, f'{{"statement": "Fine."}}\n\n{line}\n')
    with pytest.raises(DataError) as caught:
        load_facts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answers": ["a"]}, '"question" is None'),
        ({"question": "Who?"}, '"answers" is None'),
        ({"question": "Who?", "answers": []}, '"answers" is []'),
        ({"question": "W?", "choices": [], "answer": "a"}, '"choices" is []'),
        ({"question": "W?", "choices": ["a", "b"], "answer": "c"}, "\"answer\" 'c'"),
        ({"question": "W?", "choices": ["a", "b"], "answer": 2}, '"answer" 2'),
        ({"question": "W?", "choices": ["a", "b"], "answer": -1}, '"answer" -1'),
        ({"question": "W?", "choices": ["a", "b"], "answer": True}, '"answer" True'),
        ({"question": "W?", "choices": ["a", "b"]}, '"answer" None'),
    ],
)
def test_a_malformed_question_is_named_by_file_and_line(tmp_path, row, reason):
    path = write_rows(tmp_path / "q.jsonl", [{"question": "Fine?", "answers": ["yes"]}, row])
    with pytest.raises(DataError) as caught:
        load_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_numbers_are_texts(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"question": "How many?", "answer": 7, "id": 3}])
    assert load_facts(path) == [Fact(question="How many?", answer="7", id="3")]


def test_empty_lists_and_nulls_are_as_good_as_nothing(tmp_path):
    row = {"question": "Who?", "answer": "Ana", "statement": None, "paraphrases": [], "aliases": None}
    row["subject_aliases"] = []
    assert load_facts(write_rows(tmp_path / "f.jsonl", [{**row, "id": "a"}])) == [
        Fact(question="Who?", answer="Ana", id="a")
    ]


def test_two_facts_with_one_id_are_named(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{**FACT}, {"statement": "So."}, {**FACT}])
    with pytest.raises(DataError, match=r"f\.jsonl: rows 1 and 3 share the id 'zed'; rename one"):
        load_facts(path)


@pytest.mark.parametrize("load", [load_facts, load_questions, load_texts])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows_is_named(tmp_path, load, content):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=r"rows\.jsonl has no "):
        load(path)


def test_a_text_file_without_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.txt has no text"):
        load_texts(write(tmp_path, " \n\n", "x.txt"))


@pytest.mark.parametrize("load", [load_facts, load_questions, load_texts])
@pytest.mark.parametrize("suffix", ["jsonl", "txt", "json", "parquet", "csv"])
def test_a_missing_file_is_named(tmp_path, load, suffix):
    path = tmp_path / f"missing.{suffix}"
    with pytest.raises(MissingFileError, match=rf"missing\.{suffix} does not exist; check the path"):
        load(path)


def test_an_unknown_data_set_is_named_without_asking_the_network(no_network):
    with pytest.raises(MissingFileError, match="no-such-owner/no-such-set is neither a local file"):
        load_facts("no-such-owner/no-such-set")
    with pytest.raises(FileNotFoundError, match="no-such-set:test"):
        load_texts("no-such-owner/no-such-set:test")
    assert no_network == []


@pytest.mark.parametrize(
    ("name", "content"), [("bad.json", b'[{"text": "a"}, {"text": '), ("bad.parquet", b"PAR1 not at all")]
)
def test_a_damaged_local_file_is_damaged_and_not_missing(tmp_path, no_network, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        load_facts(tmp_path / name)


def test_text_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match=r"x\.jsonl is not UTF-8"):
        load_facts(tmp_path / "x.jsonl")


def test_a_folder_is_no_file_of_facts(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(DataError, match=r"x\.jsonl could not be read"):
        load_facts(tmp_path / "x.jsonl")


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path):
    rows = [{"statement": "One\u2028line\x85 here."}, {"statement": "Two."}]
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert [row for _, row in read_rows(path)] == rows


def test_windows_line_ends_are_line_ends(tmp_path):
    path = write(tmp_path, '{"statement": "One."}\r\n{"statement": "Two."}\r\n')
    assert [fact.statement for fact in load_facts(path)] == ["One.", "Two."]


@given(
    st.text(st.sampled_from("ab. \n\u2028ü"), max_size=120),
    st.integers(min_value=5, max_value=40),
)
def test_splitting_keeps_every_character_but_space_and_stays_short(text, max_chars):
    pieces = list(split_text(text, max_chars))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    # Two lines that fit are joined by a line end.
    assert all(len(piece) <= max_chars + 1 for piece in pieces)


@given(
    st.lists(st.lists(st.sampled_from(("a", "bee", "sea.", "dozen")), max_size=12), max_size=6),
    st.integers(min_value=8, max_value=40),
)
def test_splitting_keeps_words_whole(lines, max_chars):
    text = "\n".join(" ".join(line) for line in lines)
    assert [word for piece in split_text(text, max_chars) for word in piece.split()] == text.split()


@pytest.mark.parametrize("text", ["     \nab. a", "      abc", "\n" * 12])
def test_no_piece_is_blank(text):
    assert all(piece.strip() for piece in split_text(text, 5))


def test_a_long_line_is_cut_at_a_sentence_end():
    assert list(split_text("One is here. Two is there. Three.", 28)) == [
        "One is here. Two is there.",
        "Three.",
    ]


def test_texts_are_cut_into_pieces(tmp_path):
    path = write(tmp_path, "\n".join(f"Line {i} of a text." for i in range(50)), "x.txt")
    pieces = load_texts(path, max_chars=100)
    assert len(pieces) > 5
    assert "\n".join(pieces) == path.read_text(encoding="utf-8")
