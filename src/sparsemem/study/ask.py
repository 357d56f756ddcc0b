"""Ask the model of a folder, as it is or as it was."""

from pathlib import Path

from sparsemem import console
from sparsemem.evaluation.generate import answer_questions
from sparsemem.memory.attach import pools
from sparsemem.memory.checkpoint import load, local_folder, read_header
from sparsemem.prompts import PromptFormat, check_format
from sparsemem.store.deltas import DeltaStore


def ask_folder(
    folder: str | Path,
    question: str,
    *,
    without: str | None = None,
    prompt: PromptFormat = "qa",
    max_new_tokens: int = 32,
) -> str:
    """Answer a question.

    Args:
        folder: A memory folder.
        question: What to ask.
        without: Answer as before this update: its number, "last", or the beginning of its digest.
        prompt: How to ask.
        max_new_tokens: Where the answer is cut.

    Raises:
        SparsememError: The folder, the update or the prompt does not exist.
    """
    check_format(prompt)
    folder = local_folder(folder)
    read_header(folder)
    undone = DeltaStore(folder).since(without) if without else []
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder)
    for delta in undone:
        delta.invert().apply(pools(model))
    return answer_questions(model, tokenizer, [question], prompt=prompt, max_new_tokens=max_new_tokens)[0]
