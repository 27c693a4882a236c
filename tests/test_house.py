"""Rules of the house that a reader would otherwise have to check by eye."""

import ast
import re
import subprocess
import sys

import pytest
from places import ROOT

PACKAGE = ROOT / "d3_hf"


def imports_of(file):
    """Modules of d3_hf that a file imports, as paths like ``attacks.badnets``."""
    package = ("d3_hf", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            if module[:1] == ("d3_hf",):
                yield ".".join(module[1:])
                yield from (".".join((*module[1:], alias.name)) for alias in node.names)


@pytest.mark.parametrize(
    ("files", "forbidden"),
    [
        ("defenses/shared/geometry.py", ""),
        ("training/config.py", ""),
        ("defenses/**/*.py", "attacks|evaluation|workflow|victims"),
        ("training/**/*.py", "attacks|workflow|victims|defenses"),
        ("attacks/*.py", "defenses|training|workflow"),
        ("models/**/*.py", "training|defenses|attacks|workflow"),
        ("evaluation/measure.py", "attacks|defenses|training"),
    ],
)
def test_imports_run_one_way(files, forbidden):
    found = {file.name: list(imports_of(file)) for file in PACKAGE.glob(files)}
    assert found
    for name, modules in found.items():
        wrong = modules if not forbidden else [m for m in modules if re.match(forbidden, m)]
        assert not wrong, f"{name} imports {wrong}"


def test_no_code_of_a_checkpoint_can_run():
    source = "\n".join(file.read_text() for file in [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
    assert not re.search(
        r"trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True|pickle\.(loads?|Unpickler)\(|(?<!\.)\b(eval|exec)\(", source
    )
    assert all("weights_only=True" in line for line in source.splitlines() if "torch.load(" in line)


def test_models_are_called_purified_and_nothing_stronger():
    text = (PACKAGE / "publishing" / "templates" / "purified_card.md").read_text().lower()
    assert "purified" in text and not re.search(r"\bclean\b|\bsafe\b", text)


@pytest.mark.parametrize(
    ("module", "light"), [("d3_hf", ()), ("d3_hf.cli", ()), ("d3_hf.options.arguments", ("transformers",))]
)
def test_import_is_cheap(module, light):
    heavy = {"torch", "transformers", "timm", "matplotlib", "datasets"}.difference(light)  # transformers alone loads lazily
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_public_names_exist():
    import d3_hf

    for name in d3_hf.__all__:
        assert getattr(d3_hf, name).__doc__
