"""Encoders on the command line: planting, measuring, purifying, and which defence is for which kind of model."""

import json
from functools import partial

import pytest
import timm
from safetensors.torch import save_file
from tiny import PROCESSOR, tiny_vit
from tiny_encoders import tiny_clip, tiny_resnet

from d3_hf.assurance import decree
from d3_hf.commands import COMMANDS
from d3_hf.models import load_encoder

IMAGES = ["--dataset_name", "digits", "--retain_count", "200", "--max_test_images", "60"]
DIGITS = [*IMAGES, "--probe_count", "100"]
QUICK = ["--max_steps", "2", "--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "8"]


def write(folder, model):
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("encoder"), tiny_resnet())


@pytest.fixture(scope="module")
def victim(encoder, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("victims") / "victim")
    argv = ["--encoder", "--model_name_or_path", encoder, "--attack", "badencoder", "--output_dir", folder, *DIGITS, *QUICK]
    return COMMANDS["victim"].run(argv), folder


def test_a_victim_is_planted_and_measured_again_from_its_folder(victim, capsys):
    found, folder = victim
    assert found["attack"]["name"] == "badencoder" and set(found["measured"]) >= {"victim", "untouched"}
    again = COMMANDS["measure"].run([folder])
    shown = capsys.readouterr().out
    assert again["linear"] == found["measured"]["victim"]["linear"] and again["knn"] == found["measured"]["victim"]["knn"]
    assert "measured now, linear probe" in shown and "recorded, kNN" in shown


def test_an_encoder_is_pretrained_from_scratch_with_poison_and_without(tmp_path, capsys, monkeypatch):
    new = ["--encoder", "--architecture", "resnet8_cifar", "--image_mean", *["0.5"] * 3, "--image_std", *["0.5"] * 3]
    images = [*DIGITS, *QUICK, "--image_size", "16"]
    twin, victim = str(tmp_path / "twin"), str(tmp_path / "victim")
    found = COMMANDS["victim"].run([*new, *images, "--output_dir", twin])
    assert found["attack"] is None and set(found["measured"]) == {"n_images", "n_probe", "victim"}
    shown = capsys.readouterr().out
    assert "this model, linear probe" in shown and "ASR" not in shown
    attack = '{"name": "noisy_alignment", "size": 4, "image_size": 8}'
    argv = ["--attack", attack, "--poison_ratio", "0.02", "--clean_model", twin, "--output_dir", victim]
    found = COMMANDS["victim"].run([*new, *images, *argv])
    assert found["attack"]["name"] == "noisy_alignment" and "asr" in found["measured"]["untouched"]["knn"]
    again = COMMANDS["measure"].run([victim])
    assert again["linear"] == found["measured"]["victim"]["linear"]
    monkeypatch.setattr("d3_hf.inspection.encoder.decree", partial(decree.decree, schedule=decree.Schedule(epochs=1)))
    assert len(COMMANDS["check"].run([victim, "--twins", twin, *IMAGES])["decree"]["twins"]) == 1


@pytest.mark.parametrize("name", ["par", "encoder_d3", "mimic", "tsc"])
def test_purify_takes_the_defences_of_encoders(name, victim, tmp_path, capsys):
    options = ["--model_name_or_path", victim[1], "--attack", victim[1], "--output_dir", str(tmp_path / "out")]
    steps = ["--rounds", "1", "--curve_epochs", "1", *QUICK[2:]] if name == "tsc" else QUICK
    found = COMMANDS["purify"].run(["--defence", name, *options, *DIGITS, *steps])
    assert set(found) == {"before", "after"} and "asr" in found["after"]["linear"]
    shown = capsys.readouterr().out
    assert "before, linear probe" in shown and "4/4 saving the encoder" in shown
    assert load_encoder(tmp_path / "out").config.model_type == "resnet"
    assert len(json.loads((tmp_path / "out" / "retain_indices.json").read_text())) == 200


def test_any_encoder_is_measured_and_a_purified_one_beside_what_was_recorded(encoder, victim, tmp_path, capsys):
    images = ["--attack", victim[1], *DIGITS]
    options = ["--model_name_or_path", encoder, "--license", "mit", "--output_dir", str(tmp_path / "out")]
    found = COMMANDS["purify"].run(["--defence", "par", *options, *images, *QUICK])
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert COMMANDS["measure"].run([str(tmp_path / "out"), *images]) == found["after"]
    assert "recorded, linear probe" in capsys.readouterr().out
    assert COMMANDS["measure"].run([encoder, *images]) == found["before"]
    assert "recorded" not in capsys.readouterr().out


def test_check_of_an_encoder_reads_decree_beside_its_twins(encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("d3_hf.inspection.encoder.decree", partial(decree.decree, schedule=decree.Schedule(epochs=2)))
    twins = [write(tmp_path / f"twin{seed}", tiny_resnet(seed)) for seed in (1, 2)]
    alone = COMMANDS["check"].run([encoder, *IMAGES])
    shown = capsys.readouterr().out
    assert alone["kind"] == "encoder" and alone["p"] is None and alone["code"] == 0 and 0 < alone["decree"]["score"] <= 1
    assert "SHA-256 of" in shown and "DECREE" in shown and "nothing can be concluded from this score alone" in shown
    found = COMMANDS["check"].run([encoder, "--twins", *twins, *IMAGES])
    scores = list(found["decree"]["twins"].values())
    assert found["decree"]["score"] == alone["decree"]["score"] and len(scores) == 2 and found["code"] == 0
    assert found["p"] == (1 + sum(score <= alone["decree"]["score"] for score in scores)) / 3
    assert "no alarm possible at this power" in capsys.readouterr().out and json.dumps(found)
    alarmed = COMMANDS["check"].run([encoder, "--twins", *twins, "--alarm_at", "0.99", *IMAGES])
    assert alarmed["alarm"] == (alarmed["p"] <= 0.99) and alarmed["code"] == (4 if alarmed["alarm"] else 0)


def test_check_of_an_encoder_says_what_it_cannot_do(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("d3_hf.inspection.encoder.decree", partial(decree.decree, schedule=decree.Schedule(epochs=1)))
    other = write(tmp_path / "clip", tiny_clip())
    for argv, wanted in (
        (["--report", "check.html"], "--report is for classifiers"),
        (["--twins", encoder], "is the model itself: each model counts once"),
        (["--twins", other], "is of another kind than the model: clip"),
    ):
        with pytest.raises(ValueError, match=wanted):
            COMMANDS["check"].run([encoder, *argv, *IMAGES])


@pytest.mark.parametrize("name", ["d3", "fine_tuning", "nad", "auto"])
def test_a_defence_that_needs_labels_says_so_in_one_line(name, encoder, tmp_path):
    argv = ["--defence", name, "--model_name_or_path", encoder, "--output_dir", str(tmp_path / "out"), *DIGITS[:2], "--use_cpu"]
    wanted = rf"is an encoder without a head .*, and {name} needs labels and a head: for encoders there are --defence par, enc"
    with pytest.raises(ValueError, match=wanted) as caught:
        COMMANDS["purify"].run(argv)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_so_it_does_of_an_encoder_that_has_no_classifier_in_transformers(tmp_path):
    folder = write(tmp_path / "clip", tiny_clip())
    with pytest.raises(ValueError, match="and d3 needs labels and a head: for encoders there are --defence par"):
        COMMANDS["purify"].run(["--model_name_or_path", folder, "--dataset_name", "digits", "--use_cpu"])


def test_a_defence_of_encoders_refuses_a_classifier(tmp_path):
    folder = write(tmp_path / "vit", tiny_vit())
    with pytest.raises(ValueError, match="is a classifier with a head .*: load_classifier and the defences of classifiers"):
        COMMANDS["purify"].run(["--defence", "par", "--model_name_or_path", folder, "--dataset_name", "digits", "--use_cpu"])


def test_a_name_of_both_kinds_takes_the_options_of_the_checkpoints_kind(encoder, tmp_path):
    classifier, config = write(tmp_path / "vit", tiny_vit()), tmp_path / "tsc.yaml"
    config.write_text(f"model_name_or_path: {encoder}\ntemperature: 0.4\nprobe_count: 100\n")
    files = []
    for classes in (0, 3):
        files.append(str(tmp_path / f"resnet{classes}.safetensors"))
        save_file(timm.create_model("resnet20_cifar", num_classes=classes).state_dict(), files[-1])
    options = ["--architecture", "resnet20_cifar", "--image_mean", "0.5", "0.5", "0.5", "--image_std", "0.5", "0.5", "0.5"]
    for argv in ([str(config)], ["--model_name_or_path", encoder], ["--model_name_or_path", files[0], *options]):
        with pytest.raises(ValueError, match="no images: give --dataset_name"):
            COMMANDS["purify"].run(["--defence", "tsc", *argv, *(["--temperature", "0.4"] if argv[1:] else [])])
        with pytest.raises(ValueError, match="unknown argument '--max_accuracy_drop'"):
            COMMANDS["purify"].run(["--defence", "tsc", *argv, "--max_accuracy_drop", "0.1"])
    for argv in (["--model_name_or_path", classifier], ["--model_name_or_path", files[1], *options], []):
        with pytest.raises(ValueError, match="unknown argument '--temperature'"):
            COMMANDS["purify"].run(["--defence", "tsc", *argv, "--temperature", "0.4"])
    with pytest.raises(FileNotFoundError, match="no such file or folder: ./nothing"):
        COMMANDS["purify"].run(["--defence", "tsc", "--model_name_or_path", "./nothing"])


def test_what_is_missing_is_told_before_anything_is_loaded(encoder, tmp_path):
    for argv, wanted in (
        (
            ["--attack", "badnets", "--model_name_or_path", encoder, *DIGITS],
            "badnets is no attack on encoders: give --attack, one",
        ),
        (
            ["--attack", "badencoder", "--architecture", "resnet8_cifar", *DIGITS],
            "badencoder is planted in one that is trained",
        ),
        (["--attack", "ctrl", *DIGITS], "no encoder: give --architecture to pretrain one from scratch"),
        (["--probe_count", "1"], "probe_count must be at least 2"),
    ):
        with pytest.raises(ValueError, match=wanted):
            COMMANDS["victim"].run(["--encoder", *argv, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="no encoder: give --model_name_or_path"):
        COMMANDS["purify"].run(["--defence", "par"])
    with pytest.raises(ValueError, match="class_names are a classifier's"):
        COMMANDS["purify"].run(["--defence", "par", "--model_name_or_path", encoder, "--class_names", "a", "b", *DIGITS])
