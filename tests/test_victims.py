"""Making victims: every attack reaches its ASR on digits, folders describe themselves, sets resume, hardening does its work."""

import json
import os

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny import FAST, NEW_VIT
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor, set_seed

from d3_hf.attacks import ATTACKS, BadNets, InTrainingAttack, from_description, load_attack
from d3_hf.commands.measure import measure_victim
from d3_hf.data import RawImages, load_images
from d3_hf.sam import adaptive_perturbation
from d3_hf.victim_sets import is_made, make_set, make_victim, set_table
from d3_hf.victims import VictimConfig, VictimTrainer, train_victim

QUIET = {"use_cpu": True, "disable_tqdm": True}
NAMES = [str(digit) for digit in range(10)]
# Per attack: parameters that a small network learns within seconds, poison ratio, ASR in percent that it must reach, epochs.
VICTIMS = {
    "badnets": ({}, 0.1, 90, 4),
    "blended": ({}, 0.1, 90, 4),
    "sig": ({"amplitude": 120}, 0.09, 60, 4),
    "lf": ({"num_images": 10, "passes": 2}, 0.1, 80, 4),
    "lf_noise": ({}, 0.1, 80, 4),
    "trojannn": ({"steps": 30}, 0.1, 90, 4),
    # Digits are recognised by their shape even when hardened, so the corners gain little; one class cannot supply more.
    "lc_lite": ({"target_label": 8, "eps": 2, "alpha": 1, "steps": 2}, 0.094, 10, 6),
    "wanet": ({"strength": 4, "cross_ratio": 0.5}, 0.2, 60, 6),
    "input_aware": ({"mask_steps": 60}, 0.1, 60, 6),
    "ssba_lite": ({"steps": 60, "bound": 24}, 0.1, 60, 6),
    "bpp": ({"levels": 3}, 0.2, 80, 6),
}


def small_resnet(seed=0):
    """A residual network of 30,000 weights that learns digits at 32x32 in seconds."""
    set_seed(seed)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    model.image_processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model


@pytest.fixture(scope="module")
def digits():
    images = load_images("digits")
    return RawImages.from_dataset(images["train"]), RawImages.from_dataset(images["test"])


def config(folder, epochs, **options):
    options = {"num_train_epochs": epochs, "optim": "adamw_torch", "optim_args": None, "learning_rate": 0.005} | options
    options = {"per_device_train_batch_size": 32, "crop_padding": 0} | options
    return VictimConfig(output_dir=str(folder), **QUIET, **options)


@pytest.fixture(scope="module")
def clean(digits, tmp_path_factory):
    trainer = train_victim(small_resnet(), *digits, None, config(tmp_path_factory.mktemp("clean"), 4))
    assert trainer.measured["victim"]["accuracy"] > 0.9 and "asr" not in trainer.measured["victim"]
    return trainer.model


def test_every_attack_has_a_victim():
    assert VICTIMS.keys() == ATTACKS.keys()


@pytest.mark.parametrize("name", VICTIMS)
def test_every_attack_reaches_its_asr(name, digits, clean, tmp_path):
    parameters, ratio, percent, epochs = VICTIMS[name]
    attack = from_description({"name": name, **parameters})
    trainer = train_victim(small_resnet(), *digits, attack, config(tmp_path, epochs), ratio, clean_model=clean)
    found = trainer.measured["victim"]
    assert found["asr"] >= percent / 100 and found["accuracy"] > 0.85, found
    assert trainer.measured["clean_model"]["asr"] < found["asr"] / 3, "the trigger works on a model without backdoor"
    # The folder alone says what was planted and triggers as the trained attack did.
    loaded, images = load_attack(tmp_path), digits[1].images[:20]
    assert loaded == trainer.attack and torch.equal(loaded.trigger(images), trainer.attack.trigger(images))
    planted = json.loads((tmp_path / "victim.json").read_text())["planted"]
    assert planted["attack"] == attack.describe()
    rows = planted["poisoned_rows"]
    assert rows == "anew in every batch" if isinstance(attack, InTrainingAttack) else len(rows) == round(ratio * len(digits[0]))


# From options to a folder ----------------------------------------------------------------------------------------------


TOY = NEW_VIT | FAST | {"dataset_name": "digits", "retain_count": 100, "max_test_images": 60}


@pytest.fixture(scope="module")
def victim_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    victims = {"clean": {}, "badnets": {"attack": "badnets"}, "blended": {"attack": "blended", "poison_ratio": 0.05}}
    content = {"output_dir": str(folder / "victims"), "groups": {"toy": {"base": TOY, "victims": victims}}}
    (folder / "set.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    made = make_set(["--set", str(folder / "set.yaml")])
    return folder, made


def test_a_set_makes_all_its_victims(victim_set):
    folder, made = victim_set
    assert made == [str(folder / "victims" / "toy" / name) for name in ("clean", "badnets", "blended")]
    table = (folder / "victims" / "victims.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| toy/clean", "| toy/badnets", "| toy/blended"]


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
    assert [a == b for a, b in zip(times, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "other/*"], "matches no victim of .*; it has toy/clean, toy/badnets, toy/blended"),
        (
            ["--only", "toy/blended", "--poison_ratio", "0.2", "--learning_rate", "0.5"],
            "made with other learning_rate, poison_ratio; delete",
        ),
    ],
)
def test_a_set_refuses(victim_set, argv, message):
    folder, _ = victim_set
    with pytest.raises(ValueError, match=message):
        make_set(["--set", str(folder / "set.yaml"), *argv])


def test_changed_weights_do_not_verify(victim_set, tmp_path):
    folder, made = victim_set
    with open(f"{made[2]}/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match="weights are not those that victim.json names"):
        make_set(["--set", str(folder / "set.yaml"), "--only", "toy/blended"])
    with open(f"{made[2]}/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(last)


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
        make_victim(["--attack", "badnets", "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert not (tmp_path / "out").exists()


def test_set_file_is_checked(tmp_path):
    (tmp_path / "set.yaml").write_text("output_dir: out\n")
    with pytest.raises(ValueError, match="must hold output_dir and groups"):
        make_set(["--set", str(tmp_path / "set.yaml")])
    (tmp_path / "set.yaml").write_text("output_dir: out\ngroups: {one: {base: {}}}\n")
    with pytest.raises(ValueError, match="group one must hold base and victims"):
        make_set(["--set", str(tmp_path / "set.yaml")])


def test_set_table_lists_what_is_there(victim_set):
    folder, _ = victim_set
    assert len(set_table(folder / "victims", ["toy/clean", "toy/absent"]).splitlines()) == 3
    assert not is_made(folder / "victims" / "toy" / "absent", TOY)


# Hardening -------------------------------------------------------------------------------------------------------------


def test_sam_takes_the_gradient_where_the_loss_is_highest_nearby(digits, tmp_path):
    train = digits[0].select(range(32))
    model = small_resnet().train()
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "crop_padding": 0}
    trainer = VictimTrainer(model, config(tmp_path, 1, sam_rho=1.0, **options), train)
    slow = small_resnet().train()
    pixels = trainer.preprocessing(train.images)
    weights = list(slow.parameters())
    first = torch.autograd.grad(slow(pixel_values=pixels, labels=train.labels).loss, weights)
    statistics = {name: value.clone() for name, value in slow.named_buffers()}  # of the first pass only
    step = adaptive_perturbation([w.data for w in weights], list(first), 1.0)
    start = [w.detach().clone() for w in weights]
    torch._foreach_add_([w.data for w in weights], step)
    second = torch.autograd.grad(slow(pixel_values=pixels, labels=train.labels).loss, weights)
    trainer.train()
    for (name, found), w, gradient in zip(model.named_parameters(), start, second, strict=True):
        assert torch.allclose(found, w - 0.5 * gradient, atol=1e-5), name
    for name, value in model.named_buffers():
        if "num_batches" not in name:
            assert torch.allclose(value, statistics[name], atol=1e-6), name


def test_random_heads_train_the_backbone_and_leave_no_trace_in_the_model(digits, tmp_path):
    train, test = (images.select(range(200)) for images in digits)
    plain, heads = (
        train_victim(small_resnet(), train, test, BadNets(), config(tmp_path / str(count), 1, random_heads=count))
        for count in (0, 2)
    )
    assert plain.model.state_dict().keys() == heads.model.state_dict().keys()
    assert not torch.equal(*(next(trainer.model.parameters()) for trainer in (plain, heads)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **k: VictimConfig(sam_rho=-1, **k), "must be >= 0"),
        (lambda **k: VictimConfig(random_heads=-1, **k), "must be >= 0"),
        (lambda **k: VictimConfig(sam_rho=1, gradient_accumulation_steps=2, **k), "leave gradient_accumulation_steps at 1"),
    ],
)
def test_bad_options(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(output_dir=str(tmp_path), **QUIET)


def test_random_heads_need_fixed_poisoned_images(digits, tmp_path):
    with pytest.raises(ValueError, match="random_heads need fixed poisoned images"):
        VictimTrainer(small_resnet(), config(tmp_path, 1, random_heads=2), digits[0])


def test_an_attack_with_networks_of_its_own_refuses_sam(digits, tmp_path):
    attack = from_description({"name": "input_aware", "mask_steps": 1})
    with pytest.raises(ValueError, match="trains its own networks with the victim"):
        train_victim(small_resnet(), *digits, attack, config(tmp_path, 1, sam_rho=1))
