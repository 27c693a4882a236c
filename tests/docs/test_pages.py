"""Links, navigation, names and options of the README and the docs."""

import ast
import builtins
import re
from dataclasses import fields, is_dataclass

import pytest
import yaml
from pages import CARDS, DOCS, PAGES, README, blocks
from places import ROOT

import d3_hf
from d3_hf.auto.config import AutoConfig
from d3_hf.commands.audit import AuditArguments
from d3_hf.commands.benchmark import BenchmarkArguments
from d3_hf.commands.check import CheckArguments
from d3_hf.commands.purify import OPTIONS
from d3_hf.commands.push import PushArguments
from d3_hf.defenses import CLIP_DEFENCES, DEFENCES, ENCODER_DEFENCES, defence
from d3_hf.options.arguments import ProbeArguments
from d3_hf.options.pairs import PairArguments
from d3_hf.victims.record import KINDS
from d3_hf.victims.sets import SetArguments

TEXTS = {file: file.read_text() for file in (README, ROOT / "CONTRIBUTING.md", *CARDS, *PAGES)}
OWN = {file: text for file, text in TEXTS.items() if file in (README, *PAGES)}
# Options that no dataclass has: of every command, of the launcher, and of other programs.
OTHER_OPTIONS = {"help", "help_all", "json", "debug", "defence", "encoder", "clip", "victim", "purified", "output"}
OTHER_OPTIONS |= {"num_processes", "accelerate_config", "public_key"}


def named(file):
    return str(file.relative_to(ROOT))


def without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S))


def links(text):
    return [link for link in re.findall(r"\]\(([^()\s]+)\)", without_code(text)) if not re.match(r"\w+:", link)]


def anchors(text):
    """Of the headings, as Python-Markdown and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("file", TEXTS, ids=named)
def test_links_lead_somewhere(file):
    for link in links(TEXTS[file]):
        place, _, anchor = link.partition("#")
        target = file.parent / place if place else file
        assert target.exists(), link
        if file in PAGES:
            assert not place.startswith(".."), f"{link}: the site has nothing outside docs/"
        assert not anchor or anchor in anchors(target.read_text()), link


def test_links_are_found_at_all():
    assert sum(len(links(text)) for text in OWN.values()) > 60


def test_every_page_is_in_the_navigation_once():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entry):
        return (
            [entry]
            if isinstance(entry, str)
            else [p for part in (entry.values() if isinstance(entry, dict) else entry) for p in pages(part)]
        )

    shown = pages(settings["nav"])
    there = [file.name for file in PAGES] + [f"model_cards/{file.name}" for file in CARDS]
    assert sorted(shown) == sorted(there)
    assert settings["theme"]["font"] is False  # nothing is fetched


def test_the_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 150


def test_every_public_name_is_in_the_api():
    shown = re.findall(r"^::: d3_hf\.(\w+)$", TEXTS[DOCS / "api.md"], re.M)
    assert sorted(shown) == sorted(d3_hf.__all__)


def test_every_method_and_attack_is_listed():
    from d3_hf.attacks import ATTACKS

    for page, names in (("choose", DEFENCES), ("victims", ATTACKS), ("encoders", ENCODER_DEFENCES | CLIP_DEFENCES)):
        rows = "\n".join(re.findall(r"^\| (`.*?) \|", TEXTS[DOCS / f"{page}.md"], re.M))
        assert set(names) <= set(re.findall(r"`(\w+)`", rows)), page


@pytest.mark.parametrize("file", OWN, ids=named)
def test_options_exist(file):
    commands = (AutoConfig, AuditArguments, BenchmarkArguments, CheckArguments, PushArguments, SetArguments)
    own = (ProbeArguments, PairArguments, *commands)
    known = {f.name for kind in (*OPTIONS, *KINDS, *own) for f in fields(kind)}
    known |= {f.name for name in (*DEFENCES, *CLIP_DEFENCES) for f in fields(defence(name)[0])} | OTHER_OPTIONS
    known |= {f.name for name in ENCODER_DEFENCES for f in fields(defence(name, of_encoders=True)[0])}
    spans = re.findall(r"`([^`\n]+)`", OWN[file])
    named = {option for span in spans if "model_signing" not in span for option in re.findall(r"(?<![\w-])--([a-z]\w*)", span)}
    recipes = {"rounds", "steps", "vit_steps"}  # bench_speed.py's
    assert not named - known - recipes


@pytest.mark.parametrize("file", OWN, ids=named)
def test_python_compiles_and_its_imports_exist(file):
    for margin, source in blocks(OWN[file], "python"):
        tree = ast.parse(re.sub(rf"^{margin}", "", source, flags=re.M))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("d3_hf"):
                exec(compile(ast.Module([node], []), named(file), "exec"), {"__builtins__": builtins})


def test_the_attack_of_the_page_works():
    import torch

    ((_, source),) = blocks(TEXTS[DOCS / "add-an-attack.md"], "python")
    names = {"__name__": "page"}
    exec(compile(source, "add-an-attack.md", "exec"), names)
    attack, images = names["Brighter"](levels=20), torch.tensor([0, 240, 255], dtype=torch.uint8).expand(2, 3, 4, 3)
    assert is_dataclass(attack) and attack.trigger(images)[0, 0, 0].tolist() == [20, 255, 255]
    with pytest.raises(ValueError, match="levels must be an integer in"):
        names["Brighter"](levels=0)


def test_yaml_blocks_are_yaml():
    for file, text in OWN.items():
        for _, block in blocks(text, "yaml"):
            assert isinstance(yaml.safe_load(block), dict), named(file)


def test_the_errors_of_the_page_are_those_of_the_code():
    said = []
    for file in (ROOT / "d3_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    said = "\n".join(said)
    quoted = re.findall(r"^\| `(.*?)` \|", TEXTS[DOCS / "troubleshooting.md"].replace("\\|", "/"), re.M)
    assert len(quoted) > 40
    for quote in quoted:
        for piece in quote.split("…"):
            assert piece.strip(" ,") in said, f"{quote}: {piece}"


@pytest.mark.parametrize("file", OWN, ids=named)
def test_models_are_called_purified_and_nothing_stronger(file):
    assert not re.search(
        r"\b(clean|safe|trustworthy|disinfected) (models?|classifiers?|networks?|checkpoints?)\b", OWN[file], re.I
    )
