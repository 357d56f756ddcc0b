"""Run the demo once and keep its report with its provenance.

python experiments/demo/run.py 0                    # results/seed-0.json, with default options
python experiments/demo/run.py 0 anchor=all         # results/anchor-all.seed-0.json
python experiments/demo/run.py 0 method=lora learning_rate=5e-4
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from sparsemem.cli.demo import demo_facts_path, installed_data, run_demo
from sparsemem.config import FinetuneConfig, to_json
from sparsemem.files import write_json
from sparsemem.memory.checkpoint import read_header
from sparsemem.study.provenance import provenance


def main(seed: int, **options: Any) -> None:
    name = ".".join([*(f"{key}-{value}" for key, value in options.items()), f"seed-{seed}"])
    path = Path(__file__).parent / "results" / f"{name}.json"
    if path.exists():
        print(f"{path} is there already")
        return
    gguf, articles = installed_data()
    config = FinetuneConfig(seed=seed, **options)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "memory"
        report = run_demo(gguf, articles, Path(work), folder, config)
        model_sha = read_header(folder)["base_fingerprint"]
    shown = report.pop("shown")
    result = {
        "config": to_json(config),
        "metrics": report,
        "shown": shown,
        "seed": seed,
        "seconds": report["seconds"],
        **provenance(model_sha=model_sha, data=[demo_facts_path()]),
    }
    write_json(path, result)


def parse(word: str) -> tuple[str, Any]:
    key, _, text = word.partition("=")
    for kind in (int, float):
        try:
            return key, kind(text)
        except ValueError:
            continue
    return key, text


if __name__ == "__main__":
    main(int(sys.argv[1]), **dict(parse(word) for word in sys.argv[2:]))
