"""YAML first, the command line over it; what the options load."""

import logging
import re
from dataclasses import FrozenInstanceError, dataclass, field

import datasets
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from pictures import encoded, noise
from transformers import PretrainedConfig

from d3_hf.attacks import LF, BadNets, save_attack
from d3_hf.data.images import RawImages, content_hashes
from d3_hf.data.load import load_images
from d3_hf.defenses.d3.trainer import D3Config
from d3_hf.options.arguments import AttackArguments, DataArguments, ModelArguments
from d3_hf.options.parser import Parser, parse_arguments, parse_part
from d3_hf.victims.sets import KINDS


def write(folder, text):
    file = folder / "config.yaml"
    file.write_text(text)
    return str(file)


def serve(monkeypatch, made: DatasetDict) -> None:
    """Have every name stand for these images."""
    monkeypatch.setattr(
        "d3_hf.data.sources.open_source", lambda source, *_, **__: source if isinstance(source, DatasetDict) else made
    )


def test_a_part_of_the_options_is_read_as_the_whole_would_be(tmp_path):
    file = write(tmp_path, "lambda_clean: 3\nimage_size: 70\nmodel_name_or_path: mine\n")
    argv = ["--model_name_or_path", "yours", "--unknown", "--class_names", "a", "b", "--retain_count", "50", "--help"]
    assert parse_part(ModelArguments, [file, *argv]) == ModelArguments("yours", image_size=70, class_names=["a", "b"])
    assert parse_part(ModelArguments, argv[2:]) == ModelArguments(class_names=["a", "b"])
    with pytest.raises(ValueError, match="class_names must be list"):
        parse_part(ModelArguments, [write(tmp_path, "lambda_clean: large\nclass_names: 3\n")])


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


@pytest.mark.parametrize("attack", [BadNets(size=5), LF(learned={"pattern": torch.full((3, 32, 32), 5, dtype=torch.int16)})])
def test_attack_is_read_from_a_victims_folder(attack, tmp_path):
    save_attack(attack, tmp_path)
    found = AttackArguments(str(tmp_path)).load()
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(torch.uint8)
    assert found == attack and torch.equal(found.trigger(images), attack.trigger(images))
    assert AttackArguments().load() is None and AttackArguments("badnets").load() == BadNets()


def test_an_attacks_name_comes_before_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "badnets").mkdir()
    assert AttackArguments("badnets").load() == BadNets()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no attack.json"):
        AttackArguments("empty").load()
    with pytest.raises(ValueError, match="unknown attack 'nowhere'; known: badnets"):
        AttackArguments("nowhere").load()


def test_a_file_takes_further_arguments_of_its_architecture(tmp_path):
    network = timm.create_model("wrn_cifar", num_classes=3, depth=10, width=1)
    torch.save(network.state_dict(), tmp_path / "wrn.pth")
    argv = ["--model_name_or_path", str(tmp_path / "wrn.pth"), "--architecture", "wrn_cifar", "--image_mean", "0", "0", "0"]
    argv += ["--image_std", "1", "1", "1", "--model_args", '{"depth": 10, "width": 1}']
    model = parse_arguments([ModelArguments], argv)[0].load()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(pixel_values=images).logits, network.eval()(images))


@pytest.mark.parametrize(
    ("argv", "retained", "is_default"),
    [([], 3, True), (["--retain_count", "9"], 9, False), (["--retain_fraction", "0.05"], 3, False)],
)
def test_five_percent_unless_told(argv, retained, is_default, monkeypatch):
    serve(monkeypatch, DatasetDict(train=photos([0, 1, 2] * 20)))
    (data,) = parse_arguments([DataArguments], ["--dataset_name", "photos", *argv])
    assert data.is_default_size == is_default
    assert len(data.load().retain) == retained
    assert data.is_default_size == is_default


def test_images_have_to_be_named():
    with pytest.raises(ValueError, match="^no images: give --dataset_name"):
        DataArguments().load()


def test_no_help_offers_to_push_a_victim():
    victim, purified = Parser(KINDS), Parser([ModelArguments, D3Config])
    offered = victim.format_help() + victim.format_whole_help()
    assert "--random_heads" in offered and not re.search("--(push_to_hub|(no_)?hub_)", offered)
    assert "--hub_create_pr" in purified.format_help() and "--hub_strategy" in purified.format_whole_help()


class TrainingArguments:
    """Another than transformers' own."""


@dataclass
class Journey(TrainingArguments):
    """No training either."""

    speed: int = field(default=1, metadata={"help": "Speed."})


@pytest.mark.parametrize(("kind", "is_training"), [(Journey, False), (D3Config, True), (DataArguments, False)])
def test_a_training_is_known_by_its_class(kind, is_training):
    assert ("--help_all" in Parser([kind]).format_help()) == is_training


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("lamda: 3", ValueError, "unknown option lamda; --help lists"),
        ("lamda: 3\nepsilom: 2", ValueError, "unknown options epsilom, lamda; did you mean"),
        ("- 1", ValueError, "no mapping"),
        (None, FileNotFoundError, "no configuration file"),
    ],
)
def test_bad_files(tmp_path, text, error, message):
    file = str(tmp_path / "absent.yaml") if text is None else write(tmp_path, text)
    with pytest.raises(error, match=message):
        parse_arguments([ModelArguments, D3Config], [file])


# What is measured on --------------------------------------------------------------------------------------------------


def photos(labels, feature=None):
    rows = [{"bytes": encoded(noise(6, 5, 3, seed=row)), "path": None} for row in range(len(labels))]
    features = Features({"image": Image(), "label": feature or ClassLabel(num_classes=3)})
    return Dataset.from_dict({"image": rows, "label": labels}, features=features)


SIZES = {"train": 12, "test": 7, "validation": 6, "val": 5, "dev": 4}


@pytest.mark.parametrize(
    ("splits", "options", "measured", "count"),
    [
        (["train", "test", "validation"], {}, "test", 7),
        (["train", "validation", "val"], {}, "validation", 6),
        (["train", "val"], {}, "val", 5),
        (["train", "dev"], {}, "rest of train", 9),
        (["train", "dev"], {"test_split": "dev"}, "dev", 4),
        (["train"], {"test_split": "train"}, "rest of train", 9),
        (["test"], {"train_split": "test"}, "rest of test", 4),
        (["validation"], {"train_split": "validation"}, "rest of validation", 3),
    ],
)
def test_what_is_measured_on_is_named_as_it_is(splits, options, measured, count, monkeypatch, caplog):
    made = DatasetDict({name: photos([row % 3 for row in range(SIZES[name])]) for name in splits})
    serve(monkeypatch, made)
    data = DataArguments("photos", retain_count=3, **options)
    with caplog.at_level(logging.WARNING):
        found = data.load()
    assert (found.source, found.split, len(found.test)) == ("photos", measured, count)
    assert (len(found.retain), len(found.rest)) == (3, SIZES[data.train_split] - 3)
    assert (f"measuring on its {measured}" in caplog.text) == (measured != data.test_split)
    if measured.startswith("rest of"):
        assert not set(content_hashes(RawImages.from_dataset(found.retain))) & set(content_hashes(found.test))


def test_a_record_of_images_is_not_changed_afterwards():
    found = DataArguments("digits", retain_count=3, max_test_images=5).load()
    with pytest.raises(FrozenInstanceError):
        found.split = "train"


@pytest.mark.parametrize("kind", [ClassLabel(num_classes=3), Value("int64"), Value("string")], ids=["named", "int", "string"])
@pytest.mark.parametrize("hidden", [-1, None], ids=["minus one", "null"])
def test_a_split_that_is_not_used_needs_no_labels(kind, hidden, tmp_path, monkeypatch):
    """ImageNet's form on the Hub: a test split whose labels are withheld."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    labels = {"train": [0, 1, 2] * 4, "validation": [2, 1, 0], "test": [hidden] * 4}
    for name, numbers in labels.items():
        if kind == Value("string"):
            numbers = [None if number in (-1, None) else "abc"[number] for number in numbers]
        photos(numbers, kind).to_parquet(tmp_path / "data" / f"{name}.parquet")
    found = DataArguments(str(tmp_path / "data"), retain_count=3, test_split="validation").load()
    assert (found.split, found.test.labels.tolist(), len(found.test.class_names)) == ("validation", [2, 1, 0], 3)
    for options in ({}, {"train_split": "test", "test_split": "validation"}):
        with pytest.raises(ValueError, match="^split 'test' has 4 rows whose label is missing .*: .*use another split$"):
            DataArguments(str(tmp_path / "data"), retain_count=3, **options).load()


@pytest.mark.parametrize(
    "unused",
    [
        lambda: photos(["cow", "unknown"], Value("string")),
        lambda: photos([0, 1], ClassLabel(names=["cow", "hen"])),
        lambda: photos([0, 1]).remove_columns("label"),
    ],
    ids=["more classes", "another kind", "no labels"],
)
def test_a_split_that_is_not_used_may_be_of_other_classes(unused, monkeypatch):
    made = DatasetDict(train=photos(["cat", "dog"] * 3, Value("string")), val=photos(["cat", "dog"], Value("string")))
    serve(monkeypatch, DatasetDict(test=unused(), **made))
    assert DataArguments("photos", retain_count=3, test_split="val").load().test.class_names == ["cat", "dog"]


def test_a_configuration_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in (("small", 6), ("large", 9)):
        (tmp_path / "data" / name).mkdir(parents=True)
        photos([0, 1, 2] * (count // 3)).to_parquet(tmp_path / "data" / name / "train.parquet")
    entries = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("small", "large"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    argv = ["--dataset_name", str(tmp_path / "data"), "--retain_count", "3"]
    with pytest.raises(ValueError, match="2 configurations: small, large; choose one with --dataset_config"):
        parse_arguments([DataArguments], argv)[0].load()
    found = parse_arguments([DataArguments], [*argv, "--dataset_config", "large"])[0].load()
    assert (found.configuration, len(found.rest) + len(found.test)) == ("large", 12)


@pytest.mark.parametrize(
    ("class_map", "labels"),
    [("names", [2, 0, 1]), ('{"a": "b", "b": "c", "c": 2}', [0, 1, 2]), ({"a": 2, "b": 0, "c": 1}, [2, 0, 1])],
)
def test_classes_are_numbered_as_the_models(class_map, labels, tmp_path, monkeypatch):
    made = DatasetDict({split: photos([0, 1, 2], ClassLabel(names=["a", "b", "c"])) for split in ("train", "test")})
    serve(monkeypatch, made)
    if isinstance(class_map, str) and class_map != "names":
        (tmp_path / "map.json").write_text(class_map)
        class_map = str(tmp_path / "map.json")
    data = DataArguments("photos", retain_count=2, class_map=class_map)
    assert class_map == "names" or isinstance(data.class_map, dict)  # what a record holds needs no file
    found = data.load(PretrainedConfig(id2label={0: "b", 1: "c", 2: "A"}))
    assert found.test.labels.tolist() == labels and found.test.class_names == ["b", "c", "A"]
    both = {row["index"]: row["label"] for part in (found.retain, found.rest) for row in part}
    assert both == dict(enumerate(labels))
    with pytest.raises(ValueError, match="class_map is for the classes of a checkpoint"):
        data.load()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "--class_map: no file .*map.json; give one in JSON, or `names`"),
        ("[1, 2]", ValueError, "--class_map must be a JSON mapping"),
        ("{", ValueError, "--class_map is no JSON"),
    ],
)
def test_class_maps_that_cannot_be_read(text, error, message, tmp_path):
    if text:
        (tmp_path / "map.json").write_text(text)
    with pytest.raises(error, match=message):
        DataArguments("digits", class_map=str(tmp_path / "map.json"))


def test_a_split_that_is_not_used_may_be_empty(monkeypatch):
    made = DatasetDict(train=photos([0, 1, 2] * 2), test=photos([0]).select([]), val=photos([0, 1]))
    serve(monkeypatch, made)
    assert len(DataArguments("photos", retain_count=3, test_split="val").load().test) == 2
    with pytest.raises(ValueError, match="holds no images: use another split$"):
        DataArguments("photos", retain_count=3).load()


def test_nothing_is_left_where_all_is_retained(monkeypatch):
    serve(monkeypatch, DatasetDict(train=photos([0, 1, 2])))
    with pytest.raises(ValueError, match="^photos has no split 'test' and the retain set is all of 'train': nothing is left"):
        DataArguments("photos", retain_count=3).load()


def test_a_split_that_is_named_must_be_there():
    with pytest.raises(ValueError, match="digits has no split 'tset'; it has train, test"):
        DataArguments("digits", retain_count=3, test_split="tset").load()


def test_fewer_test_images_are_drawn_and_not_the_first(monkeypatch):
    made = DatasetDict(train=photos([0, 1, 2]), test=photos(sorted([0, 1, 2] * 40)))  # class by class, as a folder is read
    serve(monkeypatch, made)
    few, again, other_seed, all_of_them = (
        DataArguments("photos", retain_count=1, **options).load().test
        for options in ({"max_test_images": 30}, {"max_test_images": 30}, {"max_test_images": 30, "retain_seed": 1}, {})
    )
    assert len(few) == 30 and few.labels.bincount(minlength=3).min() >= 5
    assert content_hashes(few) == content_hashes(again) == content_hashes(other_seed)
    whole = content_hashes(RawImages.from_dataset(load_images(made)["test"]))
    assert set(content_hashes(few)) < set(whole) and content_hashes(all_of_them) == whole
    most = DataArguments("photos", retain_count=1, max_test_images=1000).load().test
    assert content_hashes(most) == whole
