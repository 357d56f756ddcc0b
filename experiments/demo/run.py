"""Run the demo once and keep its report with its provenance.

python experiments/demo/run.py [SEED]      # writes experiments/demo/results/seed-SEED.json
"""

import sys
import tempfile
from pathlib import Path

from sparsemem.cli.demo import demo_facts_path, installed_data, run_demo
from sparsemem.config import FinetuneConfig, to_json
from sparsemem.files import write_json
from sparsemem.memory.checkpoint import read_header
from sparsemem.study.provenance import provenance


def main(seed: int = 0) -> None:
    gguf, articles = installed_data()
    config = FinetuneConfig(seed=seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "memory"
        report = run_demo(gguf, articles, Path(name), folder, config)
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
    write_json(Path(__file__).parent / "results" / f"seed-{seed}.json", result)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
