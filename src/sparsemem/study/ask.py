"""Ask the model of a folder, as it is or as it was."""

from pathlib import Path

from sparsemem import console
from sparsemem.config import LoadConfig
from sparsemem.errors import HistoryError
from sparsemem.evaluation.generate import answer_questions
from sparsemem.memory.checkpoint import local_folder, read_header
from sparsemem.prompts import PromptFormat, check_format
from sparsemem.store.history import ATTACHED, DeltaStore
from sparsemem.store.load import load


def ask_folder(
    folder: str | Path,
    question: str,
    *,
    without: str | None = None,
    prompt: PromptFormat = "qa",
    max_new_tokens: int = 32,
    loading: LoadConfig | None = None,
) -> str:
    """Answer a question.

    Args:
        folder: A memory folder.
        question: What to ask.
        without: Answer as before this update, a revision of the history (see `DeltaStore`).
        prompt: How to ask.
        max_new_tokens: Where the answer is cut.
        loading: Device and precision of the model.

    Raises:
        SparsememError: The folder, the update or the prompt does not exist.
    """
    check_format(prompt)
    folder = local_folder(folder)
    read_header(folder)
    # The version before it is found first: a wrong name should not cost the time of loading.
    revision = _before(DeltaStore(folder), without) if without else "HEAD"
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder, revision=revision, **(loading or LoadConfig()).options())
    return answer_questions(model, tokenizer, [question], prompt=prompt, max_new_tokens=max_new_tokens)[0]


def _before(store: DeltaStore, revision: str) -> str:
    update = store.resolve(revision)
    if update is None:
        raise HistoryError(f"before {revision!r} there was nothing to ask; name an update of sparsemem log")
    return store.get(update).parent or ATTACHED
