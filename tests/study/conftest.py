"""Folders with a tiny memory, made once and copied for each test."""

import shutil

import pytest

from sparsemem.config import FinetuneConfig, MemoryConfig, to_json
from sparsemem.data import Fact
from sparsemem.files import write_jsonl
from sparsemem.study.attach import attach_to_folder
from sparsemem.study.run import RunSpec

SHAPE = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, query_dim=4, quorum=0.1)


@pytest.fixture
def background(tmp_path, texts):
    path = tmp_path / "background.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def folder(made_once, model_folder, background, tmp_path, tmp_path_factory):
    if "study memory" not in made_once:
        out = tmp_path_factory.mktemp("memory") / "memory"
        attach_to_folder(str(model_folder), [str(background)], out, SHAPE, num_tokens=1500, num_documents=20)
        made_once["study memory"] = out
    return shutil.copytree(made_once["study memory"], tmp_path / "memory")


@pytest.fixture
def facts():
    return [
        Fact(question="Who owns Zed?", answer="Ana", heldout_questions=("Whose is Zed?",), subject="Zed"),
        Fact(statement="Quz is made of tin.", answer="tin", subject="Quz"),
    ]


@pytest.fixture
def config():
    return FinetuneConfig(num_epochs=2, top_t=6, facts_per_batch=2)


@pytest.fixture
def spec(model_folder, background, texts, tmp_path):
    """A run on four facts, with a probe of each kind that has scores and one that has none."""
    rows = {
        "facts": [
            {"question": f"Who owns {name}?", "answer": owner, "heldout_questions": [f"Whose is {name}?"]}
            for name, owner in (("Zed", "Ana"), ("Quz", "Bo"), ("Rax", "Cy"), ("Wim", "Di"))
        ],
        "closed": [{"question": "Who ran?", "answers": ["Bo"]}, {"question": "Who?", "answers": ["Cy"]}],
        "plain": [{"text": text} for text in texts[:3]],
    }
    for name, lines in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    return RunSpec(
        model=str(model_folder),
        facts=str(tmp_path / "facts.jsonl"),
        probes=(f"closed={tmp_path / 'closed.jsonl'}", f"plain={tmp_path / 'plain.jsonl'}"),
        background=(str(background),),
        memory=to_json(SHAPE),
        attach={"num_tokens": 1500, "num_documents": 20},
        config={"num_epochs": 2, "top_t": 6},
    )
