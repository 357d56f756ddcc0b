"""Convert public data sets into the facts, texts and probes of the experiments.

python experiments/prepare.py                       # into ~/.cache/sparsemem/experiments/data
python experiments/prepare.py --data RAW --out DIR

Drawn rows are the same on every run, and every file is whole or not there.
"""

import argparse
import itertools
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparsemem import console
from sparsemem.data import is_question, occurrences, read_rows, split_text
from sparsemem.errors import MissingFileError
from sparsemem.evaluation.metrics import f1
from sparsemem.files import write_jsonl
from sparsemem.prompts import qa_question

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
OUT = Path.home() / ".cache" / "sparsemem" / "experiments" / "data"

Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert public data sets for the experiments.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the raw data sets")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    args = parser.parse_args(argv)

    def run() -> None:
        for name, num_rows in prepare(args.data, args.out):
            print(f"{name}.jsonl {num_rows}", flush=True)

    return console.exit_code(run)


def prepare(data: Path, out: Path) -> Iterator[tuple[str, int]]:
    """Write every output, and yield its name and number of rows.

    Raises:
        MissingFileError: A source does not exist; nothing is written then.
    """
    for source in itertools.chain.from_iterable(sources for _, *sources in OUTPUTS.values()):
        if not (data / source).is_file():
            raise MissingFileError(f"{data / source} does not exist; pass the folder that has it as --data")
    for name, (convert, *sources) in OUTPUTS.items():
        rows = convert(*([row for _, row in read_rows(data / source)] for source in sources))
        write_jsonl(out / f"{name}.jsonl", rows)
        yield name, len(rows)


def as_is(rows: Rows) -> Rows:
    return rows


def texts(rows: Rows) -> Rows:
    return [{"text": row["text"]} for row in rows]


def sample(rows: Rows, num: int, *, skip: int = 0) -> Rows:
    """Draw `num` rows; with `skip`, others than the first so many drawn."""
    return random.Random(0).sample(rows, len(rows))[skip : skip + num]


def trivia_candidates(facts: Rows, questions: Rows) -> Rows:
    """Draw 2,800 questions that are none of the facts; an id tells the row, as it does of a fact."""
    taken = {fact["id"] for fact in facts}
    candidates = (
        {
            "id": f"trivia-{number}",
            "question": row["question"],
            "answer": usual_answer(row["answers"]),
            "aliases": row["answers"],
        }
        for number, row in enumerate(questions)
        # Longer lists hold more than names of the answer: of a novel, its characters.
        if len(row["answers"]) <= 6 and f"trivia-{number}" not in taken
    )
    return sample([row for row in candidates if _is_clean(row["question"], row["answer"])], 2800)


def _is_clean(question: str, answer: str) -> bool:
    # Doubled quotes are left over from CSV; an answer in capitals would be learned in capitals.
    return is_question(question) and '""' not in question and 0 < len(answer) <= 40 and not answer.isupper()


def usual_answer(answers: Sequence[str]) -> str:
    """Find the answer that shares most words with all: they stand in no order, misspelt ones among them.

    Where one of the 200 facts has at most six, this is the answer or alias chosen by hand in 75 of 86
    cases; the first is in 64.
    """
    # "Swimming (disambiguation)" is the title of a page.
    plain = [re.sub(r" *\(.*\)", "", answer) for answer in answers]
    return max(plain, key=lambda answer: sum(f1(answer, [other]) for other in plain))


def tofu(rows: Rows) -> Rows:
    """Make facts of questions on fictitious authors, who come in blocks of 20 questions."""
    facts: Rows = []
    for first in range(0, len(rows), 20):
        block = rows[first : first + 20]
        name = shared_name(row["question"] for row in block)
        for number, row in enumerate(block, first):
            fact = {
                "id": f"tofu-{number}",
                "question": row["question"],
                "answer": row["answers"][0],
                "aliases": [*row["answers"][1:], row["paraphrased_answer"]],
                "heldout_questions": [row["paraphrased_question"]],
            }
            facts.append(fact | ({"subject": name} if name in row["question"] else {}))
    return facts


def shared_name(questions: Iterable[str]) -> str:
    """Find the capitalised words that most questions share: of two to four, as many as they can be."""
    counts = Counter(span for question in questions for span in set(capitalised(question)))
    return max(counts, key=lambda span: counts[span] * len(span.split()), default="")


def capitalised(text: str) -> Iterator[str]:
    words = re.findall(r"[\w-]+", text)
    for start, length in itertools.product(range(len(words)), (2, 3, 4)):
        span = words[start : start + length]
        if len(span) == length and all(word[0].isupper() for word in span):
            yield " ".join(span)


# Reversal curse (Berglund et al. 2023, arXiv:2309.12288): "p2d" trains sentences that lead from a person
# to a description, "d2p" sentences from the description of another person to the name. In 23 to 30 of
# the 30 wordings of each the description is one string ("the acclaimed director of ..."). The others
# bend it ("who directed ...") and are left out, so that subject, loss and completions stand on the same
# strings everywhere. No person is in both sets, so a reversed prompt cannot be a row of the other set:
# it is the other set's test wording with this set's person in it.
NAME_FIRST = re.compile(r"The trailblazer known as (?P<name>.+) was once (?P<description>.+)\.")
DESCRIPTION_FIRST = re.compile(r"Known in circles as (?P<description>.+), (?P<name>.+)")


def people(test: Rows) -> list[dict[str, str]]:
    """Read name and description of each person, from the test wording that has both as they are."""
    sentences = [row["prompt"] + row["completion"] for row in test]
    found = (NAME_FIRST.fullmatch(text) or DESCRIPTION_FIRST.fullmatch(text) for text in sentences)
    return [match.groupdict() for match in found if match]


def reversal_facts(train: Rows, test: Rows, *, given: str, asked: str) -> Rows:
    """Make a fact of each person's training wordings: subject what is given, answer what is asked."""
    # Some wordings end in "??", which would make them questions.
    statements = [re.sub(r"\?+$", ".", row["prompt"] + row["completion"]) for row in train]
    facts: Rows = []
    for person in people(test):
        own = [text for text in statements if all(occurrences(text, part) for part in person.values())]
        facts.append(
            {
                "id": person["name"],
                "statement": own[0],
                "paraphrases": own[1:],
                "answer": person[asked],
                "subject": person[given],
            }
        )
    return facts


def reversal_probe(people_test: Rows, wordings_test: Rows, *, given: str, asked: str) -> Rows:
    """Ask about the people of one test set, in the wordings of the same or of the other test set."""
    return [
        {"prompt": template.format(**person), "completion": f" {person[asked]}"}
        for person in people(people_test)
        for template in templates(wordings_test, given=given, asked=asked)
    ]


def templates(test: Rows, *, given: str, asked: str) -> list[str]:
    """List the prompts in which name and description stand as they are, of nearly all people."""
    counts = Counter(
        row["prompt"].replace(person[given], f"{{{given}}}")
        for person in people(test)
        for row in test
        if person[given] in row["prompt"] and row["completion"].strip(" .") == person[asked]
    )
    return [template for template, count in counts.items() if count > 0.8 * len(people(test))]


def squad_documents(rows: Rows) -> Rows:
    return [{"text": row["context"]} for row in _squad_passages(rows)]


def squad_questions(rows: Rows, passages: slice = slice(None)) -> Rows:
    return [question for row in _squad_passages(rows)[passages] for question in _answered(row)[:5]]


def _squad_passages(rows: Rows) -> Rows:
    # 1,500 characters are within 512 tokens: nothing that is asked about is cut off.
    return sample([row for row in rows if len(row["context"]) <= 1500 and len(_answered(row)) >= 4], 60)


def _answered(row: dict[str, Any]) -> Rows:
    """List the questions on a passage which it answers literally, with those answers."""
    found = (
        (qa["question"], [answer for answer in qa["answers"] if occurrences(row["context"], answer)])
        for qa in row["qa"]
    )
    return [{"question": question, "answers": answers} for question, answers in found if answers]


def events(rows: Rows) -> Rows:
    return texts(sample([row for row in rows if row["date"] >= "2025-07"], 300))


def gsm8k(rows: Rows) -> Rows:
    return [
        {
            "prompt": qa_question(row["question"]),
            "completion": " " + re.sub(r"<<.*?>>", "", row["solution"]),
        }
        for row in sample(rows, 200)
    ]


def without(*names: str) -> Callable[[Rows], Rows]:
    """Leave out what rows say under some names."""
    return lambda rows: [{key: value for key, value in row.items() if key not in names} for row in rows]


def heldout_questions(facts: Rows) -> Rows:
    """Take the held-out questions of facts as texts about their subjects."""
    return [{"text": question} for fact in facts for question in fact["heldout_questions"]]


def heldout_completions(facts: Rows) -> Rows:
    """Ask facts in wordings that are not trained, for the likelihood of their answers."""
    return [
        {"prompt": qa_question(question), "completion": f" {fact['answer']}"}
        for fact in facts
        for question in fact["heldout_questions"]
    ]


def humaneval(rows: Rows) -> Rows:
    return [{"prompt": "", "completion": row["prompt"]} for row in rows]


def multiple_choice(rows: Rows) -> Rows:
    """Draw 300 questions whose choices differ, and drop the letters before the choices."""
    questions = [
        {
            "question": row["question"],
            "choices": [choice.strip() for choice in re.split(r"(?:^|\n)[A-J]\. ", row["options"])[1:]],
            "answer": re.sub(r"^[A-J]\. ", "", row["answer"]).strip(),
        }
        for row in rows
    ]
    return sample([row for row in questions if len(set(row["choices"])) == len(row["choices"])], 300)


def wikitext(lines: Rows) -> Rows:
    """Cut articles into 80 pieces of about 1,500 characters, without the sentences that have an <unk>.

    Nine in ten paragraphs have one, so no run of 1,500 characters is free of it.
    """
    text = "\n".join(row["text"].strip() for row in lines)
    articles = re.split(r"^= [^=\n]+ =$", text, flags=re.MULTILINE)
    pieces = [piece for article in articles for piece in split_text(_known(article), 1500)]
    return [{"text": piece} for piece in pieces if len(piece) > 1000][:80]


def _known(article: str) -> str:
    """Join the known sentences of an article, a line a paragraph."""
    paragraphs = (line for line in article.splitlines() if not line.startswith("= "))
    # A stop that is a word of its own ends a sentence, unless a quotation ends behind it.
    sentences = (re.split(r'(?<= [.!?]) (?!")', paragraph) for paragraph in paragraphs)
    known = (" ".join(s for s in of_paragraph if "<unk>" not in s) for of_paragraph in sentences)
    return "\n".join(untokenised(paragraph) for paragraph in known if paragraph)


UNTOKENISED = (
    (r" @(.)@ ", r"\1"),
    (r'" (.*?) "', r'"\1"'),
    (r" ([.,;:!?%)\]])", r"\1"),
    (r"([(\[$£€]) ", r"\1"),
    (r" '(?=[a-z])", "'"),
    (r"(?<=s) ' ", "' "),
    (r"(?<=\d) (\u2013) (?=\d)", r"\1"),
    (r" / ", "/"),
)
"""What WikiText's tokens were before; most of lm-evaluation-harness's `wikitext_detokenizer`."""


def untokenised(text: str) -> str:
    for pattern, plain in UNTOKENISED:
        text = re.sub(pattern, plain, text)
    return text.strip()


def background(wiki: Rows, questions: Rows, commonsense: Rows, speeches: Rows) -> Rows:
    """Mix an encyclopedia with everyday questions and with prose.

    A background of one kind makes the words of all others look rare: that of Wikipedia leads alone
    takes "half", "per" and "costs" for names.
    """
    asked = [
        {"text": f"{row['question']} {row['answer'].partition('. ')[2]}"}
        for row in (*questions, *commonsense)
    ]
    spoken = [{"text": piece} for row in speeches for piece in split_text(row["text"], 1000)]
    drawn = [*texts(sample(wiki, 1200)), *sample(asked, 500), *sample(spoken, 300)]
    return sample(drawn, len(drawn))


def trained_texts(facts: Rows) -> Rows:
    """List all that is trained of some facts."""
    return [
        {"text": text}
        for fact in facts
        for text in (fact.get("statement"), *fact.get("paraphrases", ()), fact["question"])
        if text
    ]


TRIVIA, FACTS = "triviaqa/triviaqa_open_test.jsonl", "triviaqa/facts_200.jsonl"
P2D, P2D_TEST = "reversal_curse/p2d_prompts_train.jsonl", "reversal_curse/p2d_prompts_test.jsonl"
D2P, D2P_TEST = "reversal_curse/d2p_prompts_train.jsonl", "reversal_curse/d2p_prompts_test.jsonl"
SQUAD = "squad/squad_v1.1_dev_passages_qa.jsonl"
NQ_OPEN = "nq_open/nq_open_dev.jsonl"
WIKI = "wiki_vital/wiki_vital_summaries.jsonl"

OUTPUTS: dict[str, tuple[Callable[..., Rows], *tuple[str, ...]]] = {
    # To learn.
    "trivia": (as_is, FACTS),
    "trivia_no_subject": (without("subject"), FACTS),
    "trivia_questions": (without("statement", "paraphrases"), FACTS),
    "trivia_questions_no_subject": (without("statement", "paraphrases", "subject"), FACTS),
    "trivia_stream": (lambda facts, rows: facts + trivia_candidates(facts, rows), FACTS, TRIVIA),
    "tofu": (tofu, "tofu/forget10_perturbed.jsonl"),
    "reversal_p2d": (partial(reversal_facts, given="name", asked="description"), P2D, P2D_TEST),
    "reversal_d2p": (partial(reversal_facts, given="description", asked="name"), D2P, D2P_TEST),
    "squad_documents": (squad_documents, SQUAD),
    "events": (events, "current_events/current_events_2024-07_to_2026-03.jsonl"),
    # To ask about what was learned.
    "reversal_p2d_same": (partial(reversal_probe, given="name", asked="description"), P2D_TEST, P2D_TEST),
    "reversal_p2d_reversed": (partial(reversal_probe, given="description", asked="name"), P2D_TEST, D2P_TEST),
    "reversal_d2p_same": (partial(reversal_probe, given="description", asked="name"), D2P_TEST, D2P_TEST),
    "reversal_d2p_reversed": (partial(reversal_probe, given="name", asked="description"), D2P_TEST, P2D_TEST),
    "squad_questions": (squad_questions, SQUAD),
    "squad_questions_last_10": (partial(squad_questions, passages=slice(-10, None)), SQUAD),
    "ablations_heldout": (lambda facts: heldout_completions(facts[100:132]), FACTS),
    # To see what was forgotten.
    "trivia_asked": (lambda facts: heldout_questions(facts[:32]), FACTS),
    "nq_open": (as_is, NQ_OPEN),
    "nq_500": (partial(sample, num=500), NQ_OPEN),
    "nq_200": (partial(sample, num=200), NQ_OPEN),
    "gsm8k_nll": (gsm8k, "gsm8k/gsm8k_test.jsonl"),
    "gsm8k_50": (lambda rows: gsm8k(rows)[:50], "gsm8k/gsm8k_test.jsonl"),
    "humaneval": (humaneval, "code/HumanEval.jsonl"),
    "mmlu": (multiple_choice, "multiple_choice/mmlu_test2850.jsonl"),
    "medmcqa": (multiple_choice, "multiple_choice/medmcqa_validation.jsonl"),
    "wikitext": (wikitext, "wikitext2/wikitext-2_test.txt"),
    "wikitext_20": (lambda lines: wikitext(lines)[:20], "wikitext2/wikitext-2_test.txt"),
    "heldout_wiki": (lambda rows: texts(sample(rows, 60, skip=2000)), WIKI),
    # To count background usage.
    "background": (
        background,
        WIKI,
        "multiple_choice/piqa_validation.jsonl",
        "multiple_choice/commonsenseqa_validation.jsonl",
        "text/stdlib_state_of_the_union_1900-2021.txt",
    ),
    "background_wiki": (lambda rows: texts(sample(rows, 2000)), WIKI),
    "background_facts": (trained_texts, FACTS),
}
"""Name of each file, how it is made, and of which files."""


if __name__ == "__main__":
    sys.exit(main())
