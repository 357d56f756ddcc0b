import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsemem.data import load_completions, load_facts, load_questions, load_texts

SCRIPT = Path(__file__).parents[2] / "experiments" / "prepare.py"
prepare = SimpleNamespace(**runpy.run_path(str(SCRIPT)))

PEOPLE = (("Ana Zed", 'the maker of the film, "Zed."'), ("Bo Quay", "the first cook on Mars"))
OTHERS = (("Cy Lark", "the singer who woke the moon"), ("Di Frost", "the inventor of dry water"))

NAMES_FIRST = [
    {"prompt": prompt.format(name), "completion": completion.format(description)}
    for name, description in PEOPLE
    for prompt, completion in (
        ("The trailblazer known as {} was once", " {}."),
        ("Among many, {} shines as", " {}."),
        ("Now {} is someone who", " made what nobody had."),
    )
]
DESCRIPTIONS_FIRST = [
    {"prompt": prompt.format(description), "completion": f" {name}"}
    for name, description in OTHERS
    for prompt in ("Known in circles as {},", "Labeled as {},")
]


def raw_rows():
    """Rows of each kind of source, by file name."""
    trivia = [{"question": f"Who wrote book {i}?", "answers": ["Ana Li", "A. Li (writer)"]} for i in range(4)]
    choices = [
        {"question": f"Which is {i}?", "options": f"A. {i}\nB. {i + 1}", "answer": f"A. {i}"}
        for i in range(3)
    ]
    passage = {
        "context": "Ana was born in Rome in 1901 and sold red ink.",
        "qa": [
            {"question": f"What of {answer}?", "answers": [answer, "no such thing"]}
            for answer in ("Ana", "Rome", "1901", "red ink", "blue ink")
        ],
    }
    author = {
        "question": "Where was Ana Zed born?",
        "answers": ["Ana Zed was born in Rome."],
        "paraphrased_question": "What is Ana Zed's place of birth?",
        "paraphrased_answer": "Rome is where Ana Zed was born.",
    }
    fact = {"question": "Whose is book 1?", "answer": "Ana Li", "heldout_questions": ["Who wrote it?"]}
    return {
        "facts_200.jsonl": [fact | {"id": f"trivia-{number}"} for number in range(1, 102)],
        "triviaqa_open_test.jsonl": trivia,
        "forget10_perturbed.jsonl": [author, author | {"question": "Which awards has she won?"}],
        "p2d_prompts_train.jsonl": NAMES_FIRST,
        "p2d_prompts_test.jsonl": NAMES_FIRST,
        "d2p_prompts_train.jsonl": DESCRIPTIONS_FIRST,
        "d2p_prompts_test.jsonl": DESCRIPTIONS_FIRST,
        "squad_v1.1_dev_passages_qa.jsonl": [passage],
        "nq_open_dev.jsonl": trivia,
        "gsm8k_test.jsonl": [{"question": "2 + 3?", "solution": "It is <<2+3=5>>5.\n#### 5"}],
        "HumanEval.jsonl": [{"prompt": "def f():\n"}],
        "mmlu_test2850.jsonl": choices,
        "medmcqa_validation.jsonl": choices,
        "piqa_validation.jsonl": choices,
        "commonsenseqa_validation.jsonl": choices,
        "wiki_vital_summaries.jsonl": [{"text": f"Article {i}.", "topic": "Arts"} for i in range(2003)],
        "current_events_2024-07_to_2026-03.jsonl": [
            {"text": "Rain fell.", "date": "2025-06-30"},
            {"text": "Snow fell.", "date": "2025-07-01"},
        ],
    }


@pytest.fixture
def raw(tmp_path):
    """Every source, in a few made-up rows."""
    rows = raw_rows()
    for _, *sources in prepare.OUTPUTS.values():
        for source in sources:
            path = tmp_path / "raw" / source
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".txt":
                path.write_text(" = Rain = \n\n" + " Rain fell on <unk> . It fell all day . \n" * 150)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows[path.name]), encoding="utf-8")
    return tmp_path / "raw"


def test_every_output_is_what_the_loaders_read(raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare.main(["--data", str(raw), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"{name}.jsonl" for name in prepare.OUTPUTS]
    assert sorted(path.stem for path in out.iterdir()) == sorted(prepare.OUTPUTS)
    for line in lines:
        name, num_rows = line.split()
        load = loader(json.loads((out / name).read_text(encoding="utf-8").splitlines()[0]))
        assert len(load(out / name)) == int(num_rows) > 0


def loader(row):
    if "text" in row:
        return load_texts
    if "completion" in row:
        return load_completions
    return load_facts if "id" in row else load_questions


def test_a_second_run_writes_the_same(raw, tmp_path):
    for out in ("once", "twice", "twice"):
        list(prepare.prepare(raw, tmp_path / out))
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


def test_a_missing_source_is_named_and_nothing_is_written(raw, tmp_path, capsys):
    (raw / prepare.WIKI).unlink()
    out = tmp_path / "out"
    assert prepare.main(["--data", str(raw), "--out", str(out)]) == 2
    assert f"{raw / prepare.WIKI} does not exist; pass the folder that has it as --data" in (
        capsys.readouterr().err
    )
    assert not out.exists()


def test_drawn_rows_and_those_skipped_are_disjoint():
    rows = [{"text": str(number)} for number in range(10)]
    first, others = prepare.sample(rows, 6), prepare.sample(rows, 4, skip=6)
    assert first == prepare.sample(rows, 6)
    assert sorted(row["text"] for row in first + others) == [row["text"] for row in rows]


def test_candidates_repeat_no_fact_and_are_clean():
    questions = [
        {"question": "Who is that?", "answers": ["Ana"]},
        {"question": "Who is this?", "answers": ["Bo"]},
        {"question": '"""Who said ""No""?', "answers": ["Cy"]},
        {"question": "Name the first.", "answers": ["Di"]},
        {"question": "What is long?", "answers": ["x" * 41]},
        {"question": "What is loud?", "answers": ["RAIN"]},
        {"question": "What is large?", "answers": ["a", "b", "c", "d", "e", "f", "g"]},
    ]
    assert prepare.trivia_candidates([{"id": "trivia-0"}], questions) == [
        {"id": "trivia-1", "question": "Who is this?", "answer": "Bo", "aliases": ["Bo"]}
    ]


@pytest.mark.parametrize(
    ("answers", "usual"),
    [
        (["Swimming (disambiguation)", "Swam"], "Swimming"),
        (["Moses Martin", "Chris Martin (musician)", "Chris martin"], "Chris Martin"),
        (["Only one"], "Only one"),
    ],
)
def test_the_usual_answer_is_most_like_the_others(answers, usual):
    assert prepare.usual_answer(answers) == usual


def test_subjects_are_the_names_that_questions_share():
    questions = ["Has Ana Li Zed won?", "Where is Ana Li Zed's home?", "Is New York in 'Old Rome'?", "Who?"]
    assert prepare.shared_name(questions) == "Ana Li Zed"
    row = {"answers": ["Yes."], "paraphrased_question": "Really?", "paraphrased_answer": "Indeed."}
    facts = prepare.tofu([{"question": question, **row} for question in questions])
    assert [fact.get("subject") for fact in facts] == ["Ana Li Zed", "Ana Li Zed", None, None]


def test_reversal_facts_are_the_wordings_with_both_parts_whole():
    train = [
        {"prompt": "Ana Zed is", "completion": ' the maker of the film, "Zed.".'},
        {"prompt": "Did you know that Ana Zed is", "completion": ' the maker of the film, "Zed."??'},
        {"prompt": "Ana Zed is the one who", "completion": ' made the film, "Zed.".'},
    ]
    (fact,) = prepare.reversal_facts(train, NAMES_FIRST[:3], given="name", asked="description")
    assert fact == {
        "id": "Ana Zed",
        "statement": 'Ana Zed is the maker of the film, "Zed.".',
        "paraphrases": ['Did you know that Ana Zed is the maker of the film, "Zed.".'],
        "answer": 'the maker of the film, "Zed."',
        "subject": "Ana Zed",
    }


def test_reversal_probes_ask_in_the_wordings_of_either_set():
    same = prepare.reversal_probe(NAMES_FIRST, NAMES_FIRST, given="name", asked="description")
    assert [row["prompt"] for row in same] == [
        "The trailblazer known as Ana Zed was once",
        "Among many, Ana Zed shines as",
        "The trailblazer known as Bo Quay was once",
        "Among many, Bo Quay shines as",
    ]
    assert same[0]["completion"] == ' the maker of the film, "Zed."'
    reverse = prepare.reversal_probe(NAMES_FIRST, DESCRIPTIONS_FIRST, given="description", asked="name")
    assert reverse[2:] == [
        {"prompt": "Known in circles as the first cook on Mars,", "completion": " Bo Quay"},
        {"prompt": "Labeled as the first cook on Mars,", "completion": " Bo Quay"},
    ]


def test_passages_are_asked_only_what_they_answer():
    rows = raw_rows()["squad_v1.1_dev_passages_qa.jsonl"]
    questions = prepare.squad_questions([*rows, rows[0] | {"qa": rows[0]["qa"][:3]}])
    assert [question["answers"] for question in questions] == [["Ana"], ["Rome"], ["1901"], ["red ink"]]


def test_choices_lose_their_letters_and_keep_their_lines():
    options = "A. first\n and on\nB. J. S. Bach\nC. "
    rows = [
        {"question": "Which?", "options": f"{options}none", "answer": "B. J. S. Bach"},
        {"question": "Which of two that are one?", "options": "A. x\nB. x", "answer": "A. x"},
    ]
    assert prepare.multiple_choice(rows) == [
        {"question": "Which?", "choices": ["first\n and on", "J. S. Bach", "none"], "answer": "J. S. Bach"}
    ]


def test_gsm8k_has_no_calculator_marks():
    rows = [{"question": "2 + 3?", "solution": "It is <<2+3=5>>5.\n#### 5"}]
    assert prepare.gsm8k(rows) == [{"prompt": "Question: 2 + 3?\nAnswer:", "completion": " It is 5.\n#### 5"}]


def test_pieces_of_wikitext_stay_within_an_article_and_know_every_word():
    def article(word):
        return [f" = {word} = ", " = = More = = ", *[f" {word} fell on <unk> . The {word} fell . "] * 90]

    lines = [{"text": line} for line in article("rain") + article("snow")]
    pieces = [row["text"] for row in prepare.wikitext(lines)]
    assert len(pieces) == 2
    for piece, word in zip(pieces, ("rain", "snow"), strict=True):
        assert set(piece.split("\n")) == {f"The {word} fell."}
        assert 1000 < len(piece) <= 1500


@pytest.mark.parametrize(
    ("tokenised", "plain"),
    [
        ("In mid @-@ 1942 , 17 @,@ 900 tons ( 8 @.@ 5 % ) .", "In mid-1942, 17,900 tons (8.5%)."),
        ('" Ana \'s song " , she said .', '"Ana\'s song", she said.'),
        ("the ships ' guns didn 't fire", "the ships' guns didn't fire"),
        ("from 1934 \u2013 37 at 5 km / h for $ 3 ; no !", "from 1934\u201337 at 5 km/h for $3; no!"),
    ],
)
def test_wikitext_is_written_as_it_was(tokenised, plain):
    assert prepare.untokenised(tokenised) == plain
