"""The map of the house, and what a reader would otherwise have to check by eye.

A room is a folder of ``d3_hf/`` or a file directly in it. `FLOORS` lists them from the street down to the cellar; a room may
use all rooms of the floors below its own, and none of its own floor.
"""

import ast
import graphlib
import re
import subprocess
import sys

import pytest
from places import RECIPES, ROOT

PACKAGE = ROOT / "d3_hf"

FLOORS = [
    {"recipes": "scripts and configurations that a user copies"},
    {"cli": "the command line: which command, what an error looks like, exit codes"},
    {"commands": "what each command does with its options"},
    {"zoo": "how often check is right: models of which it is known whether they have a backdoor, read one by one"},
    {"inspection": "check and audit: what can be said of a model from its files and from images without a trigger"},
    {"benchmark": "victims x retain sets x defences x seeds: cells, tables, plots; the blind study of auto"},
    {"auto": "which defence with which settings, chosen without a trigger"},
    {
        "defenses": "D3 and its rivals, one file or folder each",
        "victims": "backdoored models, made for research, and what is recorded of them",
        "workflow": "purify: measure, train, measure, save, push",
    },
    {
        "training": "the Trainer that all defences share: checkpoints, placement, weight averages",
        "options": "what a command reads from YAML and the command line",
    },
    {
        "publishing": "manifest, card and push",
        "attacks": "triggers, to plant and to measure",
        "evaluation": "ACC, ASR, RA and PACC, guard rails, the retain set's check",
        "assurance": "what can be said of a suspicious model without its trigger",
    },
    {"models": "load, wrap and make classifiers"},
    {"data": "images, labels and batches"},
    {"labels": "class names: ordered, set on a model, read from it and compared"},
    {"files": "whole files and their digests", "errors": "exceptions and how they are worded"},
]

# Doors that stay shut although the floors would allow them.
NEVER = {
    "defenses": {"attacks", "evaluation", "victims", "options"},  # a defence sees the model and the retain set, nothing else
    "training": {"attacks"},  # no trainer sees a trigger
    "inspection": {"attacks", "victims", "workflow"},
    "auto": {"attacks", "victims", "workflow"},  # nor does a choice, nor a test image
    "defenses.shared.geometry": {"training", "models", "data"},  # D3's mathematics alone
}

FILES_IN_THE_HALL, LINES_OF_A_FILE = 6, 400


def modules():
    """Files of the package and the recipes, by module without ``d3_hf``: ``training.trainer``, ``recipes.figures``."""
    found = {f"recipes.{file.stem}": file for file in RECIPES.glob("*.py")}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name):
    """Modules that a module imports anywhere: at its top, inside a function, or for its types alone."""
    file = MODULES[name]
    package = ("d3_hf", *file.relative_to(PACKAGE).parts[:-1]) if file.is_relative_to(PACKAGE) else ()
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            below = {alias.name for alias in node.names if f"{source}.{alias.name}".removeprefix("d3_hf.") in MODULES}
            found |= {f"{source}.{module}" for module in below}
            if len(below) < len(node.names):
                found.add(source)
    return {module.removeprefix("d3_hf").removeprefix(".") for module in found if re.match(r"d3_hf\b", module)}


GRAPH = {name: imports(name) for name in MODULES}


def room(module):
    return module.partition(".")[0]


def inside(module, place):
    return module == place or module.startswith(f"{place}.")


def test_the_map_shows_every_room_once():
    shown = [name for floor in FLOORS for name in floor]
    assert sorted(shown) == sorted({room(module) for module in MODULES} - {""})


@pytest.mark.parametrize("depth", range(len(FLOORS)), ids=lambda depth: "+".join(FLOORS[depth]))
def test_imports_run_down(depth):
    below = {name for floor in FLOORS[depth + 1 :] for name in floor}
    if depth == 0:
        below.add("")  # recipes take the public names from d3_hf itself; inside the package that would close a circle
    for module in MODULES:
        if room(module) in FLOORS[depth]:
            up = sorted(used for used in GRAPH[module] if room(used) not in below | {room(module)})
            assert not up, f"{module} imports {', '.join(up)}"


@pytest.mark.parametrize("place", NEVER)
def test_shut_doors(place):
    inhabitants = [module for module in MODULES if inside(module, place)]
    assert inhabitants
    for module in inhabitants:
        forbidden = sorted(used for used in GRAPH[module] if room(used) in NEVER[place])
        assert not forbidden, f"{module} imports {', '.join(forbidden)}"


def reached(start):
    """Every module that importing a room brings along, packages on the way included; what they load later too."""
    found, open_ends = set(), [module for module in MODULES if inside(module, start)]
    while open_ends:
        module = open_ends.pop()
        if module and module not in found:
            found.add(module)
            open_ends += GRAPH.get(module, ()) | {module.rpartition(".")[0]}
    return found


def test_a_choice_reaches_neither_a_trigger_nor_a_test_image():
    found = reached("auto")
    assert {"defenses", "evaluation", "data"} <= {room(module) for module in found}
    assert not {room(module) for module in found} & {"attacks", "victims", "workflow", "commands", "benchmark"}
    assert "options.arguments" not in found  # which loads the test images


def test_no_modules_import_each_other_in_a_circle():
    try:
        graphlib.TopologicalSorter({module: used for module, used in GRAPH.items() if module}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_files_are_few_in_the_hall_and_short():
    assert len(list(PACKAGE.glob("*.py"))) <= FILES_IN_THE_HALL
    files = [file for folder in (PACKAGE, RECIPES, ROOT / "tests") for file in folder.rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert not {file: lines for file, lines in lengths.items() if lines > LINES_OF_A_FILE}


def test_no_code_of_a_checkpoint_can_run():
    source = "\n".join(file.read_text() for file in MODULES.values())
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


def test_public_names_exist_and_type_checkers_see_them():
    import d3_hf

    for name in d3_hf.__all__:
        assert getattr(d3_hf, name).__doc__
    (mirror,) = [
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    # `import x as x` is how a type checker is told that a name is public.
    shown = {alias.name: (node.module, alias.asname) for node in mirror.body for alias in node.names}
    assert shown == {name: (home, name) for name, home in d3_hf._HOMES.items()}
