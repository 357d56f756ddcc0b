"""Explain three questions about what a folder was taught, and three about nothing of it.

python experiments/explain/hundred.py DIR           # writes results/hundred.json; the README says what DIR is
"""

import sys
from pathlib import Path
from typing import Any

from sparsemem.files import write_json
from sparsemem.memory.checkpoint import read_header
from sparsemem.store.history import DeltaStore
from sparsemem.study.explain import explain_folder
from sparsemem.study.plan import plan_folder
from sparsemem.study.provenance import provenance

RESULT = Path(__file__).resolve().parent / "results" / "hundred.json"
TAUGHT = (
    "Name the ancient ruler in whose tomb Howard Carter was working during the first days of 1924?",
    "Which Hebrew prophet came down from Sinai carrying the Ten Commandments?",
    "Katherine bore her last baby in May 1966, making Michael Jackson a big brother again; "
    "what was the baby called?",
)
OTHER = (
    "At what temperature does water boil at sea level?",
    "How many sides does a hexagon have?",
    "When does the committee meet to discuss the budget?",
)


def main(folder: Path) -> None:
    store = DeltaStore(folder)
    reports = [store.details(commit.id)["report"] for commit in reversed(store.log())]
    plan = plan_folder(folder)
    result = {
        "config": store.details(store.head())["config"],
        "updates": [{name: report[name] for name in ("facts", "probes")} for report in reports],
        "texts": [described(folder, text) for text in (*TAUGHT, *OTHER)],
        "plan": {name: plan[name] for name in ("num_facts", "pools", "recommendation", "reason")},
        **provenance(model_sha=read_header(folder)["base_fingerprint"]),
    }
    write_json(RESULT, result)


def described(folder: Path, text: str) -> dict[str, Any]:
    found = explain_folder(folder, text, question=True, top=1)
    return {
        "text": text,
        "fires": found["fires"],
        "tokens": [token["text"] for token in found["tokens"] if token["fires"]],
        "facts": [row["fact"] for update in found["updates"] for row in update["facts"][:1]],
        "kl": found["kl_all"],
        "num_passes": found["num_passes"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
