"""YAML first, the command line over it."""

import pytest

from d3_hf.arguments import AttackArguments, DataArguments, ModelArguments, parse_arguments
from d3_hf.defenses.d3 import D3Config


def write(folder, text):
    file = folder / "config.yaml"
    file.write_text(text)
    return str(file)


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    file = write(tmp_path, "lambda_clean: 3\nepsilon: 0.2\nretain_count: 50\n")
    data, config = parse_arguments([DataArguments, D3Config], [file, "--epsilon", "0.3", "--use_cpu"])
    assert (config.lambda_clean, config.epsilon, config.hinge) == (3, 0.3, "sample")
    assert (data.retain_count, data.retain_fraction) == (50, None)


@pytest.mark.parametrize(
    ("yaml", "argv", "want"),
    [
        ("{}", [], "head"),
        ("target_modules: all-linear", [], "all-linear"),
        ("target_modules: '.*q_proj'", [], ".*q_proj"),
        ("target_modules: [q_proj, v_proj]", [], ["q_proj", "v_proj"]),
        ("{}", ["--target_modules", "all-linear"], "all-linear"),
        ("{}", ["--target_modules", "q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_target_modules(tmp_path, yaml, argv, want):
    (config,) = parse_arguments([D3Config], [write(tmp_path, yaml), *argv, "--use_cpu"])
    assert config.target_modules == want


@pytest.mark.parametrize("argv", [["--attack", "badnets"], ["--attack", '{"name": "badnets"}']], ids=["name", "json"])
def test_attack_is_a_name_or_json(argv):
    assert parse_arguments([AttackArguments], argv)[0].attack == {"name": "badnets"}


def test_five_percent_unless_told():
    assert parse_arguments([DataArguments], [])[0].retain_fraction == 0.05
    assert parse_arguments([DataArguments], ["--retain_count", "9"])[0].retain_fraction is None


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("lamda: 3", ValueError, "unknown option lamda"),
        ("- 1", ValueError, "no mapping"),
        (None, FileNotFoundError, "no configuration file"),
    ],
)
def test_bad_files(tmp_path, text, error, message):
    file = str(tmp_path / "absent.yaml") if text is None else write(tmp_path, text)
    with pytest.raises(error, match=message):
        parse_arguments([ModelArguments, D3Config], [file])
