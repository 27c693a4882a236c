"""The command line: how each command ends, what goes to stdout."""

import errno
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from command_line import command
from every_defence import required
from fake_hub import logged_in
from places import ROOT
from tiny import FAST, NEW_VIT

from d3_hf.cli import run
from d3_hf.commands.info import as_text
from d3_hf.commands.purify import OPTIONS
from d3_hf.defenses import DEFENCES, defence
from d3_hf.errors import GuardRailBroken, Terminated
from d3_hf.options.parser import parse_arguments

IMAGES = {"dataset_name": "digits", "retain_count": 60, "max_test_images": 40}


@pytest.mark.parametrize("name", DEFENCES)
def test_options_of_every_defence_fit_beside_those_of_a_run(name):
    config_class, _ = defence(name)
    given = {"output_dir": "out", "max_accuracy_drop": 0.2, "use_cpu": True} | required(name)
    *_, args = parse_arguments([*OPTIONS, config_class], [f"--{option}={value}" for option, value in given.items()])
    assert type(args) is config_class


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A victim, the model purified from it, a grid about it."""
    folder = tmp_path_factory.mktemp("cli")
    content = NEW_VIT | IMAGES | FAST | {"attack": "badnets", "output_dir": str(folder / "v" / "vit" / "badnets")}
    (folder / "victim.yaml").write_text(yaml.safe_dump(content))
    content = IMAGES | FAST | {"model_name_or_path": content["output_dir"], "attack": "badnets"}
    (folder / "purify.yaml").write_text(yaml.safe_dump(content))
    grid = {
        "output_dir": str(folder / "grid"), "dataset_name": "digits", "victims": ["vit/badnets"],
        "victims_dir": str(folder / "v"), "defences": {"D3": {"defence": "d3"}, "RNP": {"defence": "rnp"}},
        "retain": {"30": {"count": 30}}, "held_out": 60, "seeds": [0], "test_images": 40, "common": FAST,
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command("victim", "victim.yaml") == 0
        assert command("purify", "purify.yaml", "--output_dir", "purified", "--max_accuracy_drop", "1") == 0
    return folder


@pytest.fixture(autouse=True)
def inside(request, monkeypatch):
    if "folder" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))


VICTIM = "v/vit/badnets"


@pytest.mark.parametrize(
    ("argv", "keys"),
    [
        (["measure", VICTIM, "--json"], {"accuracy", "asr", "ra", "pacc", "trigger_drift"}),
        (["info", "purified", "--json"], {"source", "classes", "selection", "manifest"}),
        (["victim", "--json", "victim.yaml", "--output_dir", "again"], {"folder", "attack", "measured"}),
        (["benchmark", "grid.yaml", "--json"], {"rows"}),
        (
            # With the other spelling, and with the attack that the victim's folder holds.
            ["purify", "--json", "purify.yaml", "--defense", "fine_tuning", "--attack", VICTIM, "--output_dir", "ft"]
            + ["--max_accuracy_drop", "1"],
            {"accuracy_before", "asr_after", "der"},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_is_all_that_stdout_gets(folder, capsys, argv, keys):
    assert command(*argv) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert keys <= found.keys() and shown.err


def test_json_is_what_the_files_hold(folder, capsys):
    command("info", "purified", "--json")
    about = json.loads(capsys.readouterr().out)
    results = json.loads(Path("purified/all_results.json").read_text())
    assert about["manifest"]["measured"] == {key: results[key] for key in about["manifest"]["measured"]}
    assert len(about["manifest"]["measured"]) == 12 and about["manifest"]["method"] == "D3"
    command("benchmark", "grid.yaml", "--json")
    rows = json.loads(capsys.readouterr().out)["rows"]
    frame = pandas.read_parquet("grid/results.parquet")
    assert [row["defence"] for row in rows] == list(frame["defence"])
    assert "BatchNorm" in next(row["error"] for row in rows if row["defence"] == "RNP")


def test_info(folder, capsys):
    assert command("info", VICTIM, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    facts = json.loads(Path(VICTIM, "victim.json").read_text())
    assert about["source"]["kind"] == "folder" and about["source"]["sha256"]["model.safetensors"] == facts["weights_sha256"]
    assert about["classes"] == [str(digit) for digit in range(10)] and about["image_size"] == [32, 32]
    assert about["selection"] == {"head": "classifier", "linear_weights": 7}  # q, k, v, out, two of the MLP, head
    assert about["batch_norms"] == 0 and about["image_mean"] == [0.5] * 3
    assert about["manifest"]["planted"]["attack"]["name"] == "badnets" and "poisoned_rows" not in about["manifest"]["planted"]
    assert about["manifest"]["measured"]["asr"] == facts["measured"]["victim"]["asr"]
    assert command("info", VICTIM) == 0
    shown = capsys.readouterr().out.splitlines()
    assert '  head: "classifier"' in shown and f"parameters: {about['parameters']}" in shown
    assert f"    asr: {100 * facts['measured']['victim']['asr']:.1f} %" in shown
    assert f"    poison_ratio: {100 * facts['planted']['poison_ratio']:.1f} %" in "\n".join(shown)
    assert as_text({"accuracy_drop": 0.0123, "accuracy_before": 0.9, "der": 0.5}).splitlines() == [
        "accuracy_drop: 1.2 points", "accuracy_before: 90.0 %", "der: 0.5",
    ]  # fmt: skip


def test_measure_shows_what_was_recorded(folder, capsys):
    assert command("measure", VICTIM, "--max_test_images", "30") == 0
    assert "| measured now | recorded |" in capsys.readouterr().out


def test_any_folder_is_measured_with_a_trigger_that_becomes_known_later(folder, tmp_path, capsys):
    argv = ["--dataset_name", "digits", "--max_test_images", "40", "--retain_count", "60"]
    shutil.copytree("purified", tmp_path / "bare")
    for name in ("purification.json", "all_results.json", "README.md"):
        (tmp_path / "bare" / name).unlink()
    found = {}
    for place in ("purified", tmp_path / "bare"):
        assert command("measure", place, *argv, "--attack", VICTIM, "--json") == 0
        found[place] = json.loads(capsys.readouterr().out)
    recorded = json.loads(Path("purified/all_results.json").read_text())
    assert found["purified"] == found[tmp_path / "bare"] and found["purified"]["asr_n"] == recorded["asr_after_n"]
    assert {key: found["purified"][key] for key in ("accuracy", "asr", "ra")} == {
        key: recorded[f"{key}_after"] for key in ("accuracy", "asr", "ra")
    }
    assert command("measure", "purified", *argv, "--attack", "badnets") == 0
    assert "| measured now | recorded |" in capsys.readouterr().out
    assert command("measure", "purified", *argv, "--attack", "blended") == 0  # nothing was recorded of it
    assert "recorded" not in capsys.readouterr().out
    assert command("measure", VICTIM, "--attack", "blended", "--max_test_images", "30", "--json") == 0
    assert "asr" in json.loads(capsys.readouterr().out)
    assert command("measure", tmp_path / "bare", *argv, "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() == {"accuracy", "accuracy_ci95", "accuracy_n"}


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["unheard"], 2, "^d3-hf: unknown command 'unheard': choose one of drill, purify, "),
        (["make-victim"], 2, "unknown command"),
        (["purify"], 2, "^d3-hf purify: no checkpoint: give --model_name_or_path"),
        (["purify", "--retain_cuont", "5"], 2, "unknown argument '--retain_cuont': did you mean --retain_count\\?"),
        (["purify", "--retain_count", "many"], 2, "retain_count.*: invalid int value: 'many'; --help lists the options"),
        (["purify", "absent.yaml"], 2, "no configuration file absent.yaml; by name there are fire_drill_resnet, "),
        (["purify", "fire_dril"], 2, "no configuration file fire_dril; by name there are fire_drill_resnet, "),
        (["purify", "broken.yaml"], 2, "broken.yaml is no YAML"),
        (["purify", "--attack", "{name"], 2, "--attack is no JSON"),
        (["purify", "--defence", "unheard"], 2, "unknown defence 'unheard'; known: d3, fine_tuning"),
        (["purify", "--defence"], 2, "unknown defence ''"),
        (["purify", "--model_name_or_path", VICTIM], 2, "^d3-hf purify: no images: give --dataset_name"),
        (["purify", "--model_name_or_path", VICTIM, "--dataset_name", "digits"], 2, "5 % of 1437 images are 72, fewer than 10"),
        (["purify", "purify.yaml", "--max_accuracy_drop", "5"], 2, "0.05 for five points; got 5"),
        (["purify", "purify.yaml", "--model_name_or_path", "nobody/unheard"], 1, "nobody/unheard is no local path"),
        (["measure"], 2, "^d3-hf measure: no model: name a Hub id, a folder or a file"),
        (["measure", "purified"], 2, "no images: give --dataset_name .*; only a folder that make_victim wrote knows its own"),
        (["measure", VICTIM, "--attack", "unheard"], 2, "unheard"),
        (["victim", "--set", "absent.yaml"], 2, "no set of victims absent.yaml; by name there are victims, victims_paper, "),
        (["victim", "--set=absent.yaml"], 2, "no set of victims absent.yaml"),
        (["benchmark"], 2, "required: --grid"),
        (["benchmark", "unheard"], 2, "no grid unheard; by name there are ablation, "),
        (["benchmark", "grid.yaml", "--shard", "4/4"], 2, "shard must be i/n"),
        (["info"], 2, "name a Hub id, a folder or a file"),
        (["info", "absent.safetensors"], 2, "no such file or folder: absent.safetensors"),
        (["push", VICTIM, "--hub_model_id", "me/x"], 2, "holds no purification.json: it is no folder of a purified model"),
        (["push", "purified", "--hub_model_id", "me/x", "--token", "hf_x"], 2, "hf auth login"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_a_code(folder, capfd, argv, code, message):
    Path("broken.yaml").write_text("a: [1\n")
    before = sorted(folder.rglob("*"))
    capfd.readouterr()
    assert command(*argv) == code
    shown = capfd.readouterr()
    assert re.search(message, shown.err.splitlines()[-1]) and "Traceback" not in shown.err and shown.out == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("purified/purification.json", "[]", r"purification.json is no manifest of a purification \(it is no mapping\): "),
        ("purified/all_results.json", "{", r"all_results.json is no table of a purification's results \(no JSON: .*\): "),
        (f"{VICTIM}/victim.json", '{"measured": 1}', r"victim.json is no record of make_victim \(measured is no mapping\): "),
    ],
)
def test_info_of_a_damaged_record_is_one_line(folder, tmp_path, capsys, file, content, message):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(Path(file).parent, spoilt)
    (spoilt / Path(file).name).write_text(content)
    assert command("info", spoilt) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_repository_that_does_not_exist_is_a_mistake_and_a_failing_hub_is_none(folder, monkeypatch, capfd):
    with logged_in(monkeypatch) as hub:
        assert command("info", "me/unheard") == 2
        assert "no model on the Hub that you may read: check the name" in capfd.readouterr().err
        hub.broken = ("info", "500")
        assert command("info", "me/unheard") == 1


def test_a_broken_rail_ends_with_3_and_its_model_cannot_be_pushed(folder, capfd):
    argv = ["purify", "purify.yaml", "--min_class_accuracy", "1", "--max_accuracy_drop", "1", "--json"]
    assert command(*argv, "--output_dir", "ruined") == 3
    shown = capfd.readouterr()
    found = json.loads(shown.out)
    assert found["code"] == 3 and shown.err.splitlines()[-1] == f"d3-hf purify: {found['error']}"
    assert found["folder"] == "ruined/rejected" and "min_class_accuracy" in found["rejected"][0] and "accuracy_after" in found
    assert "nothing was pushed" in shown.err.splitlines()[-1] and "Traceback" not in shown.err
    assert command("push", "ruined/rejected", "--hub_model_id", "me/x") == 2
    assert "ruined/rejected was rejected and is not pushed" in capfd.readouterr().err
    command("info", "ruined/rejected", "--json")
    assert json.loads(capfd.readouterr().out)["manifest"]["rejected"] == found["rejected"]


def test_push(folder, monkeypatch, capfd):
    Path("purified/optimizer.pt").write_bytes(b"pickle")
    Path("purified/token").write_text("hf_secret")
    with logged_in(monkeypatch) as hub:
        assert command("push", "purified", "--hub_model_id", "me/purified-vit", "--json") == 0
        done = json.loads(capfd.readouterr().out)
        pushed = hub.repos["me/purified-vit"]
        sha, files = pushed.commits[-1]
    assert pushed.private and done["commit"] == sha and done["url"].endswith(sha)
    assert set(files) == {file.name for file in Path("purified").iterdir()} - {"optimizer.pt", "token"}
    assert 'model="me/purified-vit"' in files["README.md"].decode()
    assert command("push", "purified", "--hub_model_id", "me/purified-vit") == 1  # nobody listens any more
    assert "d3-hf push" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("what,\n  where"), 2, "what, where"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2, "No such file or directory: x"),
        (NotADirectoryError("x is a file"), 2, "x is a file"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "No space left on device: x: free some space or write .*"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Permission denied: x: check its permissions .*"),
        (ConnectionError("no network"), 1, "no network"),
        (RuntimeError("no selected weight moved"), 1, "no selected weight moved"),
        (FloatingPointError("the clean loss is nan"), 1, "the clean loss is nan"),
        (KeyError("x"), 1, "KeyError: 'x'; nobody foresaw this, --debug shows where it comes from"),
        (RuntimeError(), 1, "RuntimeError"),
        (RuntimeError("long " * 400), 1, r"(long ){100,200}\.\.\. \(all of it: --debug\)"),
        (GuardRailBroken(["ACC fell"], Path("out/rejected"), {}), 3, "ACC fell. The model is in out/rejected, nothing .*"),
        (KeyboardInterrupt(), 130, "interrupted; what is finished stays: run the same command again"),
        (KeyboardInterrupt("go on with x"), 130, "interrupted; go on with x"),
        (Terminated("go on with x"), 143, "terminated; go on with x"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
@pytest.mark.parametrize("debug", [False, True])
def test_how_a_recipe_ends(error, code, line, debug, capsys, monkeypatch):
    def fail(argv):
        assert argv == ["--x"]
        raise error

    monkeypatch.setattr(sys, "argv", ["recipes/some.py"])
    with pytest.raises(SystemExit) as stop:
        run(fail, ["--x", *["--debug"] * debug])
    shown = capsys.readouterr()
    assert stop.value.code == code and re.fullmatch(f"some.py: {line}", shown.err.splitlines()[-1])
    assert ("Traceback" in shown.err) == (debug and code < 130) and shown.out == ""


def test_what_returns_ends_with_0_and_the_trainers_own_debug_is_left_alone():
    seen = []
    with pytest.raises(SystemExit) as stop:
        run(seen.extend, ["--debug", "underflow_overflow", "--debug"])
    assert stop.value.code == 0 and seen == ["--debug", "underflow_overflow"]


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.py")))
def test_a_recipe_ends_like_the_command(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}", *(["path"] if recipe == "figures.py" else []), "--lamda", "3"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and ("--lamda" in line or "are required" in line)


def test_the_process_ends_with_the_code():
    done = subprocess.run([sys.executable, "-m", "d3_hf.cli", "unheard"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


@pytest.mark.parametrize(("fails", "left"), [(False, False), (True, True)])
def test_a_process_that_is_done_ends_its_connection(fails, left, capsys):
    def task(argv):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        if fails:
            raise ValueError("no")

    try:
        with pytest.raises(SystemExit):
            run(task, [])
        assert torch.distributed.is_initialized() == left
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
