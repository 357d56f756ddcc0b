"""The rules of DESIGN.md, section 2, kept by a machine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sparsemem"

LAYERS = (
    {
        "errors",
        "config",
        "console",
        "data",
        "distributed",
        "encode",
        "files",
        "likelihood",
        "names",
        "prompts",
    },
    {"memory"},
    {"slots"},
    {"training", "evaluation", "store"},
    {"study", "serving"},
    {"cli"},
)
"""Each may import what stands before it, and itself; siblings do not import each other."""

MEMORY_ORDER = (
    {"lookup", "fused_read", "rows", "base_model", "whiten"},
    {"read"},
    {"pool"},
    {"layer", "delta"},
    {"hooks"},
    {"attach"},
    {"fit_keys", "checkpoint", "shard"},
    {"grow"},
)

OPTIONAL = {
    "rich",
    "peft",
    "datasets",
    "gguf",
    "scipy",
    "matplotlib",
    "yaml",
    "lm_eval",
    "fastapi",
    "torch.distributed",
    "triton",
}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            if node.module == "sparsemem":
                found += [f"sparsemem.{alias.name}" for alias in node.names]
    return found


def rank(part: str, order: tuple[set[str], ...]) -> int:
    for number, names in enumerate(order):
        if part in names:
            return number
    pytest.fail(f"{part} has no place in the architecture; give it one in {__file__}")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    here = path.relative_to(SOURCE).with_suffix("").parts
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "sparsemem" or len(parts) == 1:
            continue
        there = parts[1:]
        if there == ["__version__"]:
            continue
        if there[0] == here[0]:
            if here[0] == "memory" and there[1:]:
                assert rank(there[1], MEMORY_ORDER) < rank(here[1], MEMORY_ORDER), (
                    f"{path.name} imports {name}"
                )
            continue
        if rank(here[0], LAYERS) == 0:
            assert rank(there[0], LAYERS) == 0, f"{path.name} imports {name}"
        else:
            assert rank(there[0], LAYERS) < rank(here[0], LAYERS), f"{path.name} imports {name}"


def test_each_optional_dependency_is_imported_in_one_file():
    users: dict[str, set[str]] = {}
    for path in modules():
        for name in imports(path):
            for dependency in OPTIONAL:
                if name == dependency or name.startswith(dependency + "."):
                    users.setdefault(dependency, set()).add(str(path.relative_to(SOURCE)))
    assert {name: files for name, files in users.items() if len(files) > 1} == {}


def test_help_imports_no_torch():
    code = (
        "import sys, sparsemem\n"
        "from sparsemem.cli.app import build_parser\n"
        "build_parser().format_help()\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_or_function_is_crowded():
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{path} has more than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                first = node.body[0].end_lineno if documented else node.lineno
                assert (node.end_lineno or 0) - (first or 0) <= 50, f"{path.name}: {node.name} is too long"


def test_every_public_name_resolves():
    import sparsemem

    for name in sparsemem.__all__:
        assert getattr(sparsemem, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparsemem.nonsense
