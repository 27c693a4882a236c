"""``--num_processes``: one command line, several processes, one answer."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate.commands import launch as accelerate
from command_line import command
from hostile import good_images, good_model
from places import RECIPES
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from d3_hf.commands import Command
from d3_hf.commands.launch import _line, take_launch
from d3_hf.errors import GuardRailBroken

TRAINS = (
    "--model_name_or_path model --dataset_name images --retain_count 12 --output_dir out --max_steps 1 --use_cpu "
    "--disable_tqdm true --max_accuracy_drop 1 --per_device_train_batch_size 2"
).split()


@pytest.mark.parametrize(
    ("argv", "asked", "rest"),
    [
        (["x.yaml", "--seed", "-1"], None, ["x.yaml", "--seed", "-1"]),
        (["--num_train_epochs", "2"], None, ["--num_train_epochs", "2"]),
        (
            ["x.yaml", "--num_processes", "2", "--attack", '{"name": "sig"}'],
            (2, "ddp"),
            ["x.yaml", "--attack", '{"name": "sig"}'],
        ),
        (["--num-processes=3", "--accelerate_config", "fsdp2"], (3, "fsdp2"), []),
        (["--accelerate_config=fsdp2", "--num", "2"], (None, "fsdp2"), ["--num", "2"]),
        (["--num_processes", "1", "x"], None, ["x"]),
        (["--num_processes", "1", "--accelerate_config", "fsdp2"], (1, "fsdp2"), []),
    ],
)
def test_what_is_asked_for_is_taken_out_of_the_arguments(argv, asked, rest):
    found, left = take_launch(argv)
    assert left == rest and (found and (found.num_processes, found.accelerate_config)) == asked


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_processes", "0"], "--num_processes must be at least 1; got 0"),
        (["--num_processes", "many"], "num_processes.*: invalid int value: 'many'; --help lists the options"),
        (["--num_processes"], "num_processes.*: expected one argument"),
    ],
)
def test_a_number_of_processes_is_a_number(argv, message, capsys):
    assert command("purify", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"d3-hf purify: .*{message}", line)


def test_processes_are_not_started_twice(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="started already: give --num_processes to `accelerate launch`"):
        take_launch(["--num_processes", "2"])


@pytest.mark.parametrize(("name", "count"), [("ddp", 2), ("fsdp2", 2), (str(RECIPES / "accelerate" / "ddp.yaml"), 2)])
def test_the_configuration_is_the_named_one(name, count):
    asked, _ = take_launch(["--accelerate_config", name])
    file = name if "/" in name else str(RECIPES / "accelerate" / f"{name}.yaml")
    assert _line(asked, on_cpu=True) == ["--config_file", file, "--num_processes", str(count), "--main_process_port", "0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("multi_node", "is for several machines: `accelerate launch` on each"),
        ("single", r"starts one process \(distributed_type NO\): leave --accelerate_config out"),
        ("unheard", "no accelerate configuration unheard; by name there are ddp, fsdp2"),
    ],
)
def test_what_it_cannot_launch_is_refused(name, message):
    asked, _ = take_launch(["--accelerate_config", name])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _line(asked, on_cpu=True)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked, _ = take_launch(["--num_processes", "3"])
    with pytest.raises(ValueError, match="3 processes, one a GPU, and there are 2 of these: give --num_processes 2"):
        _line(asked, on_cpu=False)
    assert "3" in _line(asked, on_cpu=True)


# How several processes end as one: the launcher's processes are here one after the other in this one -----------------------


@pytest.fixture
def ends(monkeypatch, capsys):
    """Run a command on two processes of which each ends as a function of its rank says; exit code and what was printed."""

    def ended(end, *argv):
        def in_turn(args):
            failures = {}
            for rank in range(2):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("RANK", str(rank))
                    patch.setattr(Command, "run", lambda self, argv, rank=rank: end(rank))
                    if code := command(*args.training_script_args):
                        failures[rank] = ProcessFailure(rank, 0, code, "")
            if failures:
                raise ChildFailedError("d3-hf", dict(reversed(failures.items())))

        monkeypatch.setattr(accelerate, "launch_command", in_turn)
        code = command("purify", "--num_processes", "2", "--use_cpu", *argv)
        return code, capsys.readouterr()

    return ended


def say(what):
    print("a table")
    return what


def fail(error):
    raise error


@pytest.mark.parametrize("argv", [[], ["--json"]])
def test_the_main_process_answers_for_all(ends, argv):
    code, shown = ends(lambda rank: say({"rank": rank}), *argv)
    assert code == 0 and (not argv or json.loads(shown.out) == {"rank": 0})
    assert (shown.err if argv else shown.out).count("a table") == 2


@pytest.mark.parametrize(
    ("end", "code", "found"),
    [
        (lambda rank: fail(ValueError("no such thing")), 2, {"error": "no such thing"}),
        (lambda rank: fail(RuntimeError("out of memory")) if rank else say({}), 1, {"error": "out of memory"}),
        (lambda rank: fail(KeyboardInterrupt("go on")), 130, {"error": "interrupted; go on"}),
        (
            lambda rank: fail(GuardRailBroken(["ACC fell"], "out/rejected", {} if rank else {"accuracy_after": 0.5})),
            3,
            {"accuracy_after": 0.5, "rejected": ["ACC fell"], "folder": "out/rejected"},
        ),
    ],
    ids=["mistake", "one fails", "interrupted", "guard rail"],
)
def test_a_failure_of_several_is_one_line_one_object_and_the_code(ends, end, code, found):
    ended, shown = ends(end, "--json")
    told = json.loads(shown.out)
    assert ended == told["code"] == code and found.items() <= told.items()
    assert [line for line in shown.err.splitlines() if line.startswith("d3-hf")] == [f"d3-hf purify: {told['error']}"]


def test_a_process_that_is_killed_is_named(ends, monkeypatch, capsys):
    def killed(args):
        raise ChildFailedError("d3-hf", {1: ProcessFailure(1, 0, -9, "")})

    monkeypatch.setattr(accelerate, "launch_command", killed)
    before = dict(os.environ)
    assert command("purify", "--num_processes", "2", "--use_cpu") == 1
    assert capsys.readouterr().err.startswith("d3-hf purify: process 1 was ended by SIGKILL; ")
    assert dict(os.environ) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "keys"),
    [
        ([], 0, {"accuracy_before", "accuracy_after"}),
        (["--min_class_accuracy", "1"], 3, {"accuracy_after", "rejected", "folder", "error"}),
        (["--class_map", "absent.json"], 2, {"error"}),
    ],
    ids=["done", "guard rail", "mistake"],
)
def test_two_processes_end_as_one(tmp_path, options, code, keys):
    good_model(tmp_path), good_images(tmp_path)
    line = [sys.executable, "-m", "d3_hf.cli", "purify", *TRAINS, "--num_processes", "2", "--json", *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == code, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert keys <= found.keys() and found.get("code", 0) == code
    told = [text for text in done.stderr.splitlines() if text.startswith("d3-hf")]
    assert told == ([f"d3-hf purify: {found['error']}"] if code else [])
    if code == 0:
        assert json.loads((tmp_path / "out" / "purification.json").read_text())["execution"]["processes"] == 2
