"""Options that are of another kind, out of range or made to do harm: one line that names them."""

import os

import pytest

from d3_hf.commands.purify import OPTIONS
from d3_hf.defenses.d3.trainer import D3Config
from d3_hf.options.parser import parse_arguments

LAUGHS = "\n".join(["a: &a0 [x]", *(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12)), "epsilon: *a12"])


def refused(argv, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([*OPTIONS, D3Config], [*argv, "--output_dir", "out", "--use_cpu"])
    assert "\n" not in str(caught.value) or "is no YAML" in str(caught.value)  # which a command puts on one line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "o.yaml is no YAML: "),
        ("a: \xff\xfe", "o.yaml is no YAML: "),
        ("", "o.yaml is no mapping of option names to values"),
        ("1: two", "o.yaml: 1 is no name of an option"),
        ("a: !!python/object/apply:os.mkdir ['ran']", "o.yaml is no YAML: "),
        (LAUGHS, "o.yaml: unknown options a, b0, "),
        ("epsilon: [1, 2]", r"o.yaml: epsilon must be float \| None; got a list"),
        ("dual_rate: null", "o.yaml: dual_rate must be float; got None"),
        ("epsilon: many", "argument --epsilon: invalid float value: 'many'"),
        ("retain_count: 2.5", r"o.yaml: retain_count must be int \| None; got 2.5, a float"),
        ("save_strategy: no", "o.yaml: save_strategy must be str; got False, a bool"),
        ("class_names: cat", "o.yaml: class_names must be .*; got 'cat', a str"),
        ("image_mean: [a, b, c]", "o.yaml: image_mean must be .*; got a list"),
        ("hinge: none", "hinge must be one of sample, batch; got 'none'"),
    ],
)
def test_files(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o.yaml").write_bytes(text.encode("latin-1"))
    refused(["o.yaml"], message)
    assert os.listdir() == ["o.yaml"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lambda_clean", "inf"], "lambda_clean must be > 0 and finite; got inf"),
        (["--learning_rate=-1"], "learning_rate must be >= 0 and finite; got -1.0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be >= 1; got 0"),
        (["--seed=-1"], "seed must be >= 0 and finite; got -1"),
        (["--hinge", "none"], "argument --hinge: invalid choice: 'none' .*; --help lists the options"),
        (["--retain_seed=-1"], "retain_seed must be at least 0; got -1"),
        (["--max_test_images", "0"], "max_test_images must be at least 1; got 0"),
    ],
)
def test_arguments(argv, message):
    refused(argv, message)
