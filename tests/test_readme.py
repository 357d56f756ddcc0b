import re
import runpy
from pathlib import Path

import pytest

import sparsemem

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_BLOCK = README[README.index("pip install .") :].partition("```")[0]


def test_results_in_the_readme_are_those_of_the_files():
    with_table = runpy.run_path(str(ROOT / "experiments" / "demo" / "table.py"))["with_table"]
    assert with_table(README) == README


def test_tables_of_experiments_in_the_readme_are_those_of_the_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    with_table = runpy.run_path(str(ROOT / "experiments" / "table.py"))["with_table"]
    for name in re.findall(r"<!-- (\w+):begin -->", README):
        if name != "demo":  # which has a table of its own
            assert with_table(README, name) == README


def test_python_in_the_readme_runs(tmp_path, monkeypatch, model_folder, texts):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (fact,) = re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "wiki.txt").write_text("\n".join(texts * 20), encoding="utf-8")
    (tmp_path / "facts.jsonl").write_text(fact.replace("\n", ""), encoding="utf-8")
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model_folder))
    tiny_memory = "layers=(1,), num_keys=8, num_heads=2, top_k=4, query_dim=4"
    code = code.replace('layers="auto"', tiny_memory)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert (tmp_path / "monday.safetensors").is_file()
    pools = sparsemem.pools(names["model"])
    assert all(pool.num_rows == 0 for pool in pools.values())


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"^sparsemem (\w+) [\w/-]+ ", COMMAND_BLOCK, re.MULTILINE)))
)
def test_commands_in_the_readme_exist(command):
    from sparsemem.cli.app import COMMANDS

    assert any(add.__name__ == f"add_{command}" for add in COMMANDS)
