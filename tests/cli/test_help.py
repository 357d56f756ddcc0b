import argparse
import dataclasses
import re
import subprocess
import sys

import pytest

from sparsemem.cli.app import build_parser
from sparsemem.config import FinetuneConfig, MemoryConfig, field_docs


def commands():
    (subparsers,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from sparsemem.cli.app import build_parser; build_parser().format_help(); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", commands())
def test_every_command_has_an_example_of_itself(name):
    text = commands()[name].format_help()
    example = text.partition("example:")[2]
    assert f"sparsemem {name}" in example


@pytest.mark.parametrize("name", commands())
def test_every_option_has_a_text(name):
    for action in commands()[name]._actions:
        if action.option_strings:
            assert action.help, f"{name} {action.option_strings}"
            assert len(action.help) > 10


@pytest.mark.parametrize("name", commands())
def test_every_command_has_json(name):
    assert commands()[name].parse_known_args
    assert "--json" in commands()[name].format_help()


@pytest.mark.parametrize("name", commands())
def test_the_help_of_the_program_names_every_command(name):
    assert re.search(rf"^    {name}\s", build_parser().format_help(), re.MULTILINE)


@pytest.mark.parametrize(("name", "cls"), [("attach", MemoryConfig), ("learn", FinetuneConfig)])
def test_every_field_of_a_config_is_an_option_with_its_text(name, cls):
    text = " ".join(commands()[name].format_help().split())
    for field in dataclasses.fields(cls):
        assert f"--{field.name.replace('_', '-')}" in text
        # Without spaces and hyphens: argparse folds lines at both.
        squeezed = text.replace(" ", "").replace("-", "")
        assert field_docs(cls)[field.name].replace(" ", "").replace("-", "") in squeezed
