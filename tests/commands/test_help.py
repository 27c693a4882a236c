"""What help shows and costs: a screen for all commands, groups for a training's options, nothing heavy loaded for it."""

import ast
import contextlib
import io
import re
import subprocess
import sys
from inspect import get_annotations

import pytest
from command_line import command
from places import ROOT

from d3_hf import cli
from d3_hf.commands import COMMANDS
from d3_hf.defenses import DEFENCES, defence
from d3_hf.options.parser import GROUPS


@pytest.mark.parametrize(
    ("argv", "heavy"),
    [
        ([], {"torch", "transformers", "pandas", "datasets", "matplotlib"}),
        # Its parser is transformers', which loads its parts when they are used.
        (["push"], {"torch", "pandas", "datasets", "matplotlib"}),
        (["benchmark"], {"torch", "pandas", "datasets", "matplotlib"}),
        # Its options are a TrainingArguments, which brings torch.
        (["purify"], {"sklearn", "scipy", "pandas", "datasets", "matplotlib", "timm", "transformers.modeling_utils"}),
    ],
    ids=["all commands", "push", "benchmark", "purify"],
)
def test_help_loads_nothing_heavy(argv, heavy):
    code = f"""
import sys
from d3_hf.cli import main
sys.argv = ["d3-hf", *{argv}, "--help"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
print("loaded:", *sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:" and "--help" in done.stdout


def test_help_into_a_closed_pipe_is_quiet():
    done = subprocess.run(f"{sys.executable} -m d3_hf.cli --help | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_help_fits_a_screen(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["d3-hf", "--help"])
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert 24 <= len(lines) <= 40 and max(map(len, lines)) <= 128
    assert [line.split()[0] for line in lines if re.match(r"  \w", line)] == list(COMMANDS)


@pytest.fixture(scope="module")
def helps():
    """What each command's --help prints, by the command."""
    return {name: shown(name, "--help") for name in COMMANDS}


def shown(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert command(*argv) == 0
    return text.getvalue()


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z]\w*", text))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_begins_with_a_real_example(helps, name):
    first, example, *_ = helps[name].splitlines()
    assert first == "example:" and example.startswith(f"      d3-hf {name} ")
    assert options_in(example) <= options_in(helps[name])
    assert "--json" in helps[name] and "\n  -h, --help" in helps[name]
    assert len(helps[name].splitlines()) <= 80 and max(map(len, helps[name].splitlines())) <= 128


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.trains])
def test_a_trainings_options_are_in_groups(helps, name):
    groups = re.split(r"^(\w[\w ]*):\n", helps[name][helps[name].index("\nmodel:\n") + 1 :], flags=re.M)
    shown = dict(zip(groups[1::2], map(options_in_lines, groups[2::2]), strict=True))
    assert list(shown) == [title for title in GROUPS if title in shown] and len(shown) >= 5
    assert "--model_name_or_path" in shown["model"] and "--retain_count" in shown["images"] and "--seed" in shown["run"]
    if name != "victim":
        assert {"--lambda_clean", "--learning_rate"} <= shown["method"] and len(shown["what must hold"]) == 3


def options_in_lines(text):
    return {line.split()[0] for line in text.splitlines()}


def options_in_messages():
    """Options that the package's strings name, docstrings aside."""
    texts = []
    for file in (ROOT / "d3_hf").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings are
        texts += [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in alone]
    named = re.findall(r"(?<![\w-])--[a-z]\w*(?![\w-])", "\n".join(text for text in texts if isinstance(text, str)))
    return set(named) - {"--config_file", "--main_process_port"}  # accelerate's


def test_help_shows_what_messages_recommend(helps):
    of_methods = [shown("purify", "--defence", name, "--help") for name in ("base_tuning", "auto", "clean_clip")]
    known = options_in("\n".join([*helps.values(), *of_methods, shown("victim", "--set", "x", "--help")]))
    known |= {"--help", "--help_all", "--version", "--defense", "--option"}
    named = options_in_messages() - {"--token", "--hub_token", "--no_"}  # refused where they are given; a prefix
    assert len(named) > 30 and named <= known


def test_help_has_what_a_file_needs_and_says_what_options_do(helps):
    needed = {"image_mean", "image_std", "class_names", "test_split", "max_test_images", "min_class_accuracy"}
    assert {f"--{name}" for name in needed} <= options_in(helps["purify"])
    lines = {line.split()[0]: line for line in helps["purify"].splitlines() if line.startswith("  --")}
    assert (
        "0.05" in lines["--retain_fraction"] and "folder" in lines["--attack"] and "`true`" in lines["--resume_from_checkpoint"]
    )
    assert lines["--push_to_hub"].endswith("at the end")
    assert "retain set" not in next(line for line in helps["victim"].splitlines() if "--num_train_epochs" in line)


@pytest.mark.parametrize("name", DEFENCES)
def test_help_shows_what_a_method_adds(name):
    short, whole = shown("purify", "--defence", name, "--help"), shown("purify", "--defence", name, "--help_all")
    own = {f"--{option}" for option in get_annotations(defence(name)[0])}
    assert own <= options_in(short) < options_in(whole) and "--weight_decay" in whole


def test_options_named_in_the_readme_exist(helps):
    others = [shown("purify", "--defence", name, "--help") for name in ("base_tuning", "lmr", "auto")]
    ours = "\n".join([*helps.values(), *others, shown("purify", "--help_all"), shown("victim", "--set", "x", "--help")])
    recipes = {"--rounds", "--steps", "--vit_steps", "--purified", "--output", "--victim"}  # bench, figures
    theirs = {"--config_file", "--num_processes", "--signature", "--ignore-paths", "--private_key", "--public_key"}
    known = options_in(ours) | recipes | theirs  # accelerate, model-signing
    assert options_in((ROOT / "README.md").read_text()) <= known
    assert {"--set", "--only", "--defence"} <= known
