"""Which files of a checkpoint count: an index and its shards, two copies of the weights, what else lies beside them."""

import json
import shutil

import pytest
import torch
from networks import NORM, WRN, Net, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from d3_hf.files import sha256
from d3_hf.models import load_classifier
from d3_hf.models.checkpoint_files import HUB_FILES, SETTINGS

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"


def in_two_shards(folder, source):
    """Save the model of a folder again, in two shards."""
    model = AutoModelForImageClassification.from_pretrained(source)
    model.save_pretrained(folder, max_shard_size="12KB")
    ViTImageProcessor.from_pretrained(source).save_pretrained(folder)
    assert len(list(folder.glob("model-*-of-00002.safetensors"))) == 2
    return folder


@pytest.fixture(scope="module")
def sharded(vit_folder, tmp_path_factory):
    return in_two_shards(tmp_path_factory.mktemp("sharded"), vit_folder)


@pytest.fixture
def folder(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "model")


def edit_index(folder, change, name=INDEX):
    index = json.loads((folder / name).read_text())
    change(index)
    (folder / name).write_text(json.dumps(index))


def named(index, **weight_map):
    index["weight_map"] |= weight_map


def pickled_shards(folder):
    """Put pickles and their index in place of the safetensors shards."""
    index = json.loads((folder / INDEX).read_text())
    for file in sorted(folder.glob("model-*.safetensors")):
        torch.save(load_file(file), folder / f"pytorch_{file.stem}.bin")
        file.unlink()
    index["weight_map"] = {
        name: f"pytorch_{file.removesuffix('.safetensors')}.bin" for name, file in index["weight_map"].items()
    }
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def older_shards(folder):
    shutil.copy(folder / FIRST, folder / "model-00001-of-00005.safetensors")


def whole(folder, **changes):
    """The weights of the shards in one dict."""
    tensors = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(file)
    return tensors | changes


OTHER_BIAS = {"classifier.bias": torch.ones(10)}
CONTRADICTS = f"{INDEX} contradicts "


IN_THE_INDEX = [
    (lambda f: (f / FIRST).unlink(), FileNotFoundError, f"{INDEX} names shards that are not there: {FIRST}; fetch"),
    (lambda f: edit_index(f, lambda i: named(i, evil=FIRST)), ValueError, f"{CONTRADICTS}{FIRST}, .* does not hold evil:"),
    (
        lambda f: edit_index(f, lambda i: i["weight_map"].pop("classifier.bias")),
        ValueError,
        rf"{CONTRADICTS}model-0000\d-of-00002.safetensors, which holds beyond the index classifier.bias: fetch",
    ),
    (
        lambda f: edit_index(f, lambda i: i["metadata"].update(total_size=7)),
        ValueError,
        rf"{CONTRADICTS}its shards: total_size is 7, they hold \d+ bytes",
    ),
    (lambda f: edit_index(f, lambda i: named(i, a="../model.safetensors")), ValueError, r"names \.\./model.* beside it"),
    (lambda f: edit_index(f, lambda i: named(i, a="/etc/a.safetensors")), ValueError, "names /etc/a.safetensors, which"),
    (lambda f: edit_index(f, lambda i: named(i, a="evil.bin")), ValueError, "names evil.bin, which is no .safetensors"),
    (lambda f: edit_index(f, lambda i: named(i, a=[1])), ValueError, r"names \[1\], which is no"),
    (lambda f: edit_index(f, lambda i: i.update(weight_map={})), ValueError, "names no weights"),
    (lambda f: edit_index(f, lambda i: i.pop("weight_map")), ValueError, r"is no index of shards \(no weight_map\)"),
    (lambda f: (f / INDEX).write_text("{"), ValueError, r"is no index of shards \(no JSON"),
]
IN_THE_FOLDER = [
    (older_shards, ValueError, f"holds shards that {INDEX} does not name, .*: model-00001-of-00005.safetensors; remove"),
    (lambda f: (f / INDEX).unlink(), ValueError, rf"holds shards that no {INDEX} names, .*: {FIRST}, model-00002-of"),
    (
        lambda f: save_file(whole(f, **OTHER_BIAS), f / SAFE),
        ValueError,
        rf"two copies of its weights that differ, {SAFE} and {INDEX} \(in classifier.bias\), and other programs",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), IN_THE_INDEX + IN_THE_FOLDER)
def test_a_folder_whose_files_contradict_each_other(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("damage", "error", "message"), IN_THE_INDEX)
def test_an_index_that_contradicts_its_shards_as_a_file(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_classifier(folder / INDEX, **WRN, **NORM)
    assert "\n" not in str(caught.value)


def test_an_index_settles_what_counts_and_is_recorded(folder, vit_folder):
    model = load_classifier(folder)
    assert torch.equal(logits(model), logits(load_classifier(vit_folder)))
    files = {"config.json", "preprocessor_config.json", INDEX, FIRST, "model-00002-of-00002.safetensors"}
    assert model.source.sha256 == {name: sha256(folder / name) for name in files}


def test_pickled_shards(folder, vit_folder):
    pickled_shards(folder)
    model = load_classifier(folder)
    assert torch.equal(logits(model), logits(load_classifier(vit_folder)))
    assert "pytorch_model.bin.index.json" in model.source.sha256
    edit_index(folder, lambda i: named(i, evil="pytorch_model-00001-of-00002.bin"), "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match="contradicts pytorch_model-00001-of-00002.bin, which does not hold evil"):
        load_classifier(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_as_a_file(tmp_path, suffix):
    torch.manual_seed(0)
    net, save = Net().eval(), save_file if suffix == ".safetensors" else torch.save
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weights, index = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}, {}
    for number, names in enumerate((list(weights)[:4], list(weights)[4:]), start=1):
        shard = f"{stem}-0000{number}-of-00002{suffix}"
        save({name: weights[name] for name in names}, tmp_path / shard)
        index |= dict.fromkeys(names, shard)
    path = tmp_path / f"{stem}{suffix}.index.json"
    path.write_text(json.dumps({"weight_map": index}))  # the metadata is optional
    model = load_classifier(path, module=Net(), **NORM)
    assert torch.equal(logits(model), logits(load_classifier(net, **NORM)))
    assert model.source.sha256.keys() == {path.name, *index.values()}
    with pytest.raises(ValueError, match=rf"is one of 2 shards: pass their index, {path.name}$"):
        load_classifier(tmp_path / index["model.stem.weight"], module=Net(), **NORM)


def test_an_index_is_no_way_out_of_its_folder(folder, tmp_path):
    (folder / FIRST).rename(tmp_path / "elsewhere")
    (folder / FIRST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{FIRST} is a link out of the folder"):
        load_classifier(folder / INDEX, **WRN, **NORM)


def two_copies(folder, tmp_path, **changes):
    weights = load_file(folder / SAFE) | changes
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    return tmp_path


def test_copies_in_two_formats_that_agree(vit_folder, tmp_path):
    load_classifier(two_copies(vit_folder, tmp_path, counter=torch.tensor(3)))
    half = {name: tensor.half() for name, tensor in load_file(vit_folder / SAFE).items()}
    torch.save(half, tmp_path / "pytorch_model.bin")  # the same, rounded
    model = load_classifier(tmp_path)
    assert torch.equal(logits(model), logits(load_classifier(vit_folder))) and "pytorch_model.bin" not in model.source.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (OTHER_BIAS, "that differ, model.safetensors and pytorch_model.bin .in classifier.bias., and other programs may load"),
        ({"classifier.bias": torch.ones(3)}, "that differ, .*in classifier.bias"),
        ({"extra": torch.ones(3)}, "that differ, .*in extra"),
        ({"extra": "text"}, r"that cannot be compared, .*: remove one \(.*pytorch_model.bin is no state dict"),
    ],
)
def test_copies_in_two_formats_that_disagree(vit_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(two_copies(vit_folder, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_other_programs_weights_are_told(vit_folder, tmp_path, caplog):
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    others = ["model.fp16.safetensors", "tf_model.h5"]
    for name in (*others, "training_args.bin", "optimizer.pt", "rng_state_0.pth", "trigger.safetensors"):
        (tmp_path / name).touch()
    load_classifier(tmp_path)
    assert "also holds model.fp16.safetensors, tf_model.h5: not compared with the weights" in caplog.text
    (tmp_path / SAFE).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model.*; model.fp16.safetensors, tf_model.h5 is not read by name"):
        load_classifier(tmp_path)


def test_weights_in_the_layout_of_another_library(vit_folder, tmp_path):
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    save_file(load_file(tmp_path / SAFE), tmp_path / SAFE, metadata={"format": "flax"})
    with pytest.raises(ValueError, match=r"model.safetensors has the layout of another library \(format 'flax'\)"):
        load_classifier(tmp_path)


def test_what_is_fetched_from_the_hub_is_what_a_folder_is_judged_by():
    assert set(SETTINGS) < set(HUB_FILES) and {SAFE, INDEX} < set(HUB_FILES)
    assert not [pattern for pattern in HUB_FILES if not pattern.endswith((".json", ".safetensors"))]
