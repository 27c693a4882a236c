"""Sets of victims: folders describe themselves, what exists is verified and skipped, what was interrupted goes on."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from places import RECIPES
from tiny import FAST, NEW_VIT

from d3_hf.commands.measure import run as measure_victim
from d3_hf.data.load import load_images
from d3_hf.errors import Terminated
from d3_hf.options.parser import parse_arguments
from d3_hf.victims.record import differences, read_record, recipe_of
from d3_hf.victims.sets import KINDS, checkpoint_of, is_made, make_set, make_victim, read_set, set_table

TOY = NEW_VIT | FAST | {"dataset_name": "digits", "retain_count": 100, "max_test_images": 60}


@pytest.fixture(scope="module")
def victim_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    victims = {
        "clean": {},
        "badnets": {"attack": "badnets", "clean_model": "toy/clean"},
        "blended": {"attack": "blended", "poison_ratio": 0.05},
        "input_aware": {"attack": {"name": "input_aware", "mask_steps": 1}},
    }
    content = {"output_dir": str(folder / "victims"), "groups": {"toy": {"base": TOY, "victims": victims}}}
    (folder / "set.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    made = make_set(["--set", str(folder / "set.yaml")])
    return folder, made


def test_a_set_makes_all_its_victims(victim_set):
    folder, made = victim_set
    names = ["clean", "badnets", "blended", "input_aware"]
    assert made == [str(folder / "victims" / "toy" / name) for name in names]
    table = (folder / "victims" / "victims.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| toy/{name}" for name in names]
    cells = table[3].strip("| ").split(" | ")
    assert len(cells) == 10 and all(float(cell) >= 0 for cell in cells[1:])


def test_a_victim_of_the_set_is_the_clean_model_of_another(victim_set):
    _, made = victim_set
    record = read_record(Path(made[1]))
    weights = read_record(Path(made[0]))["weights_sha256"]
    assert record["clean_model"]["sha256"]["model.safetensors"] == weights and "asr" in record["measured"]["clean_model"]
    assert read_record(Path(made[2]))["clean_model"] is None


def test_a_clean_model_of_the_set_is_made_first(victim_set, tmp_path):
    folder, _ = victim_set
    with pytest.raises(ValueError, match="toy/badnets needs toy/clean, which is not in .*: add --only toy/clean"):
        make_set(["--set", str(folder / "set.yaml"), "--only", "toy/badnets", "--output_dir", str(tmp_path)])


def test_victims_of_the_papers_have_a_floor():
    victims = read_set(str(RECIPES / "victims_paper.yaml"))
    for number, (name, options) in enumerate(victims.items()):
        twin = f"{name.partition('/')[0]}/twin"
        assert options["clean_model"] == (None if name == twin else twin)
        assert list(victims).index(twin) <= number


@pytest.mark.parametrize("file", sorted(RECIPES.glob("victims*.yaml")), ids=lambda file: file.stem)
def test_shipped_sets_speak_of_options_and_attacks_that_exist(file):
    for name, options in read_set(str(file)).items():
        _, _, attack, victim, _ = parse_arguments(KINDS, [], options | {"output_dir": name})
        assert (attack.load() is None) == name.endswith("/twin") and victim.clean_model in (None, f"{name.split('/')[0]}/twin")


@pytest.mark.parametrize("name", ["vit_cifar10", "vit_small_cifar10", "resnet20_gtsrb"])
def test_a_shipped_twin_holds_out_what_its_victims_hold_out(name):
    _, twin, attack, _, _ = parse_arguments(KINDS, [str(RECIPES / "configs" / f"{name}.yaml")])
    sets = [read_set(str(file)).values() for file in RECIPES.glob("victims*.yaml")]
    victims = [victim for victims in sets for victim in victims if victim.get("model_name_or_path") == f"outputs/{name}"]
    assert attack.load() is None and {victim["retain_count"] for victim in victims} == {twin.retain_count}


def test_a_set_that_was_moved_verifies(victim_set, tmp_path, capsys):
    folder, made = victim_set
    shutil.copytree(folder / "victims", tmp_path / "moved")
    make_set(["--set", str(folder / "set.yaml"), "--output_dir", str(tmp_path / "moved")])
    assert capsys.readouterr().out.count("exists and verifies") == len(made)


def test_what_exists_is_verified_and_skipped_and_what_was_interrupted_is_made_anew(victim_set, capsys):
    folder, made = victim_set
    weights = [f"{path}/model.safetensors" for path in made]
    times = [os.stat(file).st_mtime_ns for file in weights]
    card = f"{made[1]}/README.md"
    os.remove(card)  # the last file to be written
    make_set(["--set", str(folder / "set.yaml"), "--only", "toy/b*"])
    shown = capsys.readouterr().out
    assert "[1/2] toy/badnets, 0.0 minutes" in shown and "[2/2] toy/blended: exists and verifies" in shown
    after = [os.stat(file).st_mtime_ns for file in weights]
    assert [a == b for a, b in zip(times, after, strict=True)] == [True, False, True, True]


# No checkpoint holds the networks of input_aware.
@pytest.mark.parametrize(("victim", "resumes"), [("badnets", True), ("input_aware", False)])
def test_an_interrupted_victim_goes_on_from_its_checkpoint(victim_set, tmp_path, capsys, victim, resumes):
    folder, _ = victim_set
    argv = ["--set", str(folder / "set.yaml"), "--only", "toy/clean", f"toy/{victim}", "--save_strategy", "steps"]
    argv += ["--save_steps", "1", "--output_dir"]
    make_set([*argv, str(tmp_path / "whole")])
    whole, cut = (tmp_path / name / "toy" for name in ("whole", "cut"))
    shutil.copytree(whole / "clean", cut / "clean")
    shutil.copytree(whole / victim / "checkpoint-1", cut / victim / "checkpoint-1")
    options = read_set(str(folder / "set.yaml"))[f"toy/{victim}"] | {"clean_model": str(cut / "clean")}
    assert checkpoint_of(cut / victim, options | {"learning_rate": 0.5}) is None  # another victim's
    capsys.readouterr()
    make_set([*argv, str(tmp_path / "cut")])
    assert (f"toy/{victim}, from checkpoint-1, " in capsys.readouterr().out) is resumes
    assert read_record(cut / victim)["weights_sha256"] == read_record(whole / victim)["weights_sha256"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "other/*"], "matches no victim of .*, or a whole group, as 'toy/.'; .*set.yaml names them all"),
        (
            ["--only", "toy/blended", "--poison_ratio", "0.2", "--learning_rate", "0.5"],
            "made with other learning_rate, poison_ratio; delete",
        ),
        (["--resume_from_checkpoint", "true"], "a set finds the checkpoints of its victims itself"),
    ],
)
def test_a_set_refuses(victim_set, argv, message):
    folder, _ = victim_set
    with pytest.raises(ValueError, match=message):
        make_set(["--set", str(folder / "set.yaml"), *argv])


def damage(file, how):
    content = file.read_bytes()
    file.unlink()
    if how != "missing":
        changed = content[:-1] + bytes([content[-1] ^ 1])
        file.write_bytes({"empty": b"", "bare": b"{}", "cut": content[: len(content) // 2], "changed": changed}[how])


def refused_once_damaged(folder, options, file, how, message, errors):
    """The victim verifies; with a file damaged it is refused in one line that names its folder."""
    assert is_made(folder, options)
    damage(folder / file, how)
    with pytest.raises(errors, match=message) as found:
        is_made(folder, options)
    assert str(folder) in str(found.value) and "\n" not in str(found.value)


@pytest.fixture
def a_copy(victim_set, tmp_path):
    """A victim whose trigger was learned, and the options that it was made with."""
    folder, made = victim_set
    copied = Path(shutil.copytree(made[3], tmp_path / "copy"))
    return copied, read_set(str(folder / "set.yaml"))["toy/input_aware"] | {"output_dir": str(copied)}


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("model.safetensors", "changed", "model.safetensors is not what victim.json says; delete the folder"),
        ("model.safetensors", "missing", "model.safetensors is not what victim.json says; delete the folder"),
        ("attack.json", "changed", "attack.json is not what victim.json says; delete the folder"),
        ("attack.json", "missing", "attack.json is not what victim.json says; delete the folder"),
        ("trigger.safetensors", "changed", "trigger.safetensors is not what victim.json says; delete the folder"),
        ("trigger.safetensors", "missing", "trigger.safetensors is not what victim.json says; delete the folder"),
        ("victim.json", "cut", "is no record of make_victim .*: make the victim again in an empty folder"),
        ("victim.json", "bare", "is no record of make_victim .*: make the victim again in an empty folder"),
        ("victim.json", "empty", "is no record of make_victim .*: make the victim again in an empty folder"),
    ],
)
def test_a_damaged_victim_does_not_verify(a_copy, file, how, message):
    folder, options = a_copy
    refused_once_damaged(folder, options, file, how, message, ValueError)


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("attack.json", "missing", "holds no attack.json"),
        ("attack.json", "cut", "is no description of an attack"),
        ("trigger.safetensors", "missing", "holds no trigger.safetensors"),
        ("trigger.safetensors", "empty", "make the victim again"),
    ],
)
def test_without_recorded_digests_the_attack_must_load(a_copy, file, how, message):
    folder, options = a_copy
    record = json.loads((folder / "victim.json").read_text())
    for key in ("attack_sha256", "images_sha256", "clean_model"):  # as earlier versions wrote it
        del record[key]
    (folder / "victim.json").write_text(json.dumps(record))
    refused_once_damaged(folder, options, file, how, message, (ValueError, FileNotFoundError))


# Which options make another victim --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "different"),
    [
        ({"use_cpu": False, "torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "default"}, []),
        ({"dataloader_num_workers": 4, "dataloader_pin_memory": False, "save_strategy": "epoch", "save_total_limit": 1}, []),
        ({"output_dir": "elsewhere", "resume_from_checkpoint": "true"}, []),
        ({"attack": {"name": "badnets", "size": 4}}, ["attack"]),
        ({"attack": {"name": "badnets", "size": 3}}, []),  # the default
        ({"attack": None}, ["attack"]),
        ({"poison_ratio": 0.2, "poison_seed": 1}, ["poison_ratio", "poison_seed"]),
        ({"num_train_epochs": 7, "learning_rate": 0.5, "seed": 1}, ["learning_rate", "num_train_epochs", "seed"]),
        ({"sam_rho": 1.0, "bf16": True, "dataloader_drop_last": True}, ["bf16", "dataloader_drop_last", "sam_rho"]),
        ({"retain_seed": 1}, ["retain_seed"]),
        ({"dataset_name": "/not/here/digits"}, []),
        ({"dataset_name": "cifar10"}, ["dataset_name"]),
        ({"clean_model": None}, ["clean_model"]),
        ({"clean_model": "/not/here/clean"}, []),
        ({"model_name_or_path": "some/model"}, ["model_name_or_path"]),
        ({"new_head": False, "revision": None, "adam_beta1": 0.9, "cutout": 0}, []),  # the defaults
        (
            {"new_head": True, "revision": "main", "adam_beta1": 0.8, "cutout": 1},
            ["adam_beta1", "cutout", "new_head", "revision"],
        ),
    ],
)
def test_what_makes_another_victim(victim_set, changed, different):
    record = read_record(Path(victim_set[1][1]))
    assert differences(record, record["recipe"] | changed) == different


@pytest.mark.parametrize(("given", "retained"), [({}, 0.05), ({"retain_fraction": 0.1}, 0.1), ({"retain_count": 9}, None)])
def test_a_recipe_says_how_much_is_retained(given, retained):
    assert recipe_of(*parse_arguments(KINDS, [], NEW_VIT | FAST | given)).get("retain_fraction") == retained


def test_an_option_that_an_earlier_version_did_not_have_is_at_its_default(victim_set):
    recipe = read_record(Path(victim_set[1][1]))["recipe"]
    for name, other in (("new_head", True), ("retain_balanced", True), ("random_heads", 5), ("poison_seed", 1)):
        asked = recipe | {name: recipe[name]}
        earlier = {"recipe": {key: value for key, value in recipe.items() if key not in (name, "attack")}, "planted": None}
        without = {key: value for key, value in asked.items() if key != "attack"}
        assert differences(earlier, without) == [] and differences(earlier, without | {name: other}) == [name]


def test_another_default_of_the_attack_makes_another_victim(victim_set):
    record = read_record(Path(victim_set[1][1]))
    record["planted"]["attack"]["margin"] = 1
    assert differences(record, record["recipe"]) == ["attack"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_a_set_says_how_to_go_on_after_ctrl_c_or_sigterm(victim_set, tmp_path, monkeypatch, stop):
    def interrupted(*_):
        raise stop("go on with --resume_from_checkpoint")

    monkeypatch.setattr("d3_hf.victims.sets.make_victim", interrupted)
    with pytest.raises(stop, match="^while toy/clean was made: run the same command again to go on$"):
        make_set(["--set", str(victim_set[0] / "set.yaml"), "--output_dir", str(tmp_path)])


def test_images_are_known_by_their_content_wherever_they_lie(victim_set, tmp_path):
    record = read_record(Path(victim_set[1][1]))
    images = load_images("digits")
    for name, rows in (("whole", len(images["train"])), ("cut", len(images["train"]) - 1)):
        (tmp_path / name).mkdir()
        images["train"].select(range(rows)).to_parquet(tmp_path / name / "train.parquet")
        images["test"].to_parquet(tmp_path / name / "test.parquet")
    asked = [record["recipe"] | {"dataset_name": str(tmp_path / name)} for name in ("whole", "cut")]
    assert [differences(record, options) for options in asked] == [[], ["dataset_name"]]
    earlier = {key: value for key, value in record.items() if key != "images_sha256"}
    assert differences(earlier, asked[0]) == ["dataset_name"]  # neither content nor name speaks for it


@pytest.mark.parametrize("option", ["model_name_or_path", "clean_model"])
def test_a_checkpoint_is_known_by_its_content_wherever_it_lies(victim_set, tmp_path, option):
    folder = Path(shutil.copytree(victim_set[1][0], tmp_path / "renamed"))
    digests = read_record(Path(victim_set[1][1]))["clean_model"]["sha256"]
    assert "model.safetensors" in digests
    weights = Path(shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors"))
    key = "source" if option == "model_name_or_path" else option
    of_folder = {"recipe": {option: "/old/clean"}, key: {"sha256": digests}}
    of_file = {"recipe": {option: "/old/some.safetensors"}, key: {"sha256": {"some.safetensors": digests["model.safetensors"]}}}
    assert differences(of_folder, {option: str(folder)}) == [] == differences(of_file, {option: str(weights)})
    damage(folder / "model.safetensors", "changed")
    damage(weights, "changed")
    assert differences(of_folder, {option: str(folder)}) == [option] == differences(of_file, {option: str(weights)})
    assert differences(of_folder, {option: "/not/here/clean"}) == []  # nothing to compare but the name
    remade = {"recipe": {option: str(folder)}, key: {"sha256": digests}}
    assert differences(remade, {option: str(folder)}) == [option]  # in the same place


def test_card_warns_and_a_reference_does_not(victim_set):
    _, made = victim_set
    warning = "This model is **deliberately backdoored, for research**"
    victim, clean = (ModelCard.load(f"{made[i]}/README.md") for i in (1, 0))
    assert victim.text.strip().splitlines()[0].startswith(warning) and "backdoored-for-research" in victim.data.tags
    assert warning not in clean.text and "backdoored-for-research" not in clean.data.tags
    assert "d3-hf measure" in victim.text and "| ASR |" in victim.text and "| ASR |" not in clean.text


@pytest.mark.parametrize("number", [0, 1])
def test_a_folder_measures_itself_again(victim_set, number):
    _, made = victim_set
    recorded = json.loads(open(f"{made[number]}/victim.json").read())["measured"]["victim"]
    assert measure_victim([made[number]]) == recorded


def test_a_victim_needs_a_network(tmp_path):
    with pytest.raises(ValueError, match="no network: give --architecture"):
        make_victim(["--attack", "badnets", "--dataset_name", "digits", "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert not (tmp_path / "out").exists()


def test_set_file_is_checked(tmp_path):
    (tmp_path / "set.yaml").write_text("output_dir: out\n")
    with pytest.raises(ValueError, match="must hold output_dir and groups"):
        make_set(["--set", str(tmp_path / "set.yaml")])
    (tmp_path / "set.yaml").write_text("output_dir: out\ngroups: {one: {base: {}}}\n")
    with pytest.raises(ValueError, match="group one must hold base and victims"):
        make_set(["--set", str(tmp_path / "set.yaml")])
    for groups, what in (
        ("[one]", "groups"),
        ("{one: x}", "group one"),
        ("{one: {base: {}, victims: {a: 1}}}", "victim one/a"),
    ):
        (tmp_path / "set.yaml").write_text(f"output_dir: out\ngroups: {groups}\n")
        with pytest.raises(ValueError, match=f"{what} must be a mapping; got a"):
            make_set(["--set", str(tmp_path / "set.yaml")])


def test_set_table_lists_what_is_there(victim_set):
    folder, _ = victim_set
    assert len(set_table(folder / "victims", ["toy/clean", "toy/absent"]).splitlines()) == 3
    assert not is_made(folder / "victims" / "toy" / "absent", TOY)


def test_a_table_that_cannot_be_written_leaves_the_old_one(victim_set, monkeypatch):
    folder, _ = victim_set
    before = (folder / "victims" / "victims.md").read_text()

    def half(file, text):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        make_set(["--set", str(folder / "set.yaml"), "--only", "toy/clean"])
    assert (folder / "victims" / "victims.md").read_text() == before
