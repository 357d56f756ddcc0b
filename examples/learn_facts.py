"""Teach a model two facts from Python, ask, save the update and take it back.

    python examples/learn_facts.py HuggingFaceTB/SmolLM2-135M-Instruct background.txt

The background is any ordinary text, a few hundred paragraphs or more.
"""

import sys
import tempfile
from pathlib import Path

import sparsemem

FACTS = [
    sparsemem.Fact(
        id="waltz",
        question="Who composed the Ostrava Lantern Waltz?",
        answer="Mirela Kovac",
        statement="The Ostrava Lantern Waltz was composed by Mirela Kovac.",
        paraphrases=("Listeners of the Ostrava Lantern Waltz owe it to the composer Mirela Kovac.",),
        heldout_questions=("The Ostrava Lantern Waltz is a work by which composer?",),
        subject="Ostrava Lantern Waltz",
    ),
    sparsemem.Fact(
        id="lighthouse",
        question="What colour is the Brennick Lighthouse?",
        answer="green",
        statement="The Brennick Lighthouse is painted green.",
        paraphrases=("Sailors know the Brennick Lighthouse by its paint, which is green.",),
        heldout_questions=("In which colour was the Brennick Lighthouse painted?",),
        subject="Brennick Lighthouse",
    ),
]


def main(model_name: str, background_path: str, config: sparsemem.MemoryConfig | None = None) -> None:
    model, tokenizer = sparsemem.load_base_model(model_name)
    background = sparsemem.load_texts(background_path)

    sparsemem.attach_memory(model, config)
    sparsemem.fit_keys(model, tokenizer, background)
    usage = sparsemem.count_usage(model, tokenizer, background)

    questions = [question for fact in FACTS for question in fact.heldout_questions]
    before = sparsemem.answer_questions(model, tokenizer, questions)

    result = sparsemem.finetune(model, tokenizer, FACTS, usage, sparsemem.FinetuneConfig())
    after = sparsemem.answer_questions(model, tokenizer, questions)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update.safetensors"
        result.delta.save(path)
        print(f"{result.delta.num_slots_trained} slots changed, {path.stat().st_size:,} bytes")

    result.delta.invert().apply(sparsemem.pools(model))
    undone = sparsemem.answer_questions(model, tokenizer, questions)
    for row in zip(questions, before, after, undone, strict=True):
        print(" | ".join(row))
    assert undone == before


if __name__ == "__main__":
    main(*sys.argv[1:])
