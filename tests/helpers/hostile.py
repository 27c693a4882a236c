"""Hostile and broken inputs, and what each must end with: a table, see test_hostile.py.

A case starts from a folder with a good checkpoint ``model`` and good images ``images`` (three classes); `make` spoils them.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from d3_hf.models import load_classifier

NAMES = ("cat", "dog", "frog")
PURIFY = (
    "--model_name_or_path model --dataset_name images --retain_count 6 --output_dir out --max_steps 1 --use_cpu "
    "--disable_tqdm true --max_accuracy_drop 1 --per_device_train_batch_size 4"
)


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: What is wrong with it.
        words: Options after (a YAML file: before) those of `PURIFY`, or a whole command that begins with its name.
        says: Regular expression: all of what follows ``d3-hf COMMAND: `` in the last line of stderr; with code 0 somewhere.
        make: Spoils the input in a folder.
        code: Exit code.
        patch: Changes the surroundings, by a MonkeyPatch.
        needs_no_gpu: The machine must not have one.
    """

    name: str
    words: str
    says: str
    make: Callable[[Path], object] = lambda here: None
    code: int = 2
    patch: Callable[[object], object] = lambda monkeypatch: None
    needs_no_gpu: bool = False


# Checkpoints ---------------------------------------------------------------------------------------------------------------


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def weights(change):
    """Change the tensors of the checkpoint."""

    def make(here):
        tensors = load_file(here / "model/model.safetensors")
        change(tensors)
        save_file(tensors, here / "model/model.safetensors")

    return make


def content(data, file="model/model.safetensors"):
    """Replace a file's bytes."""

    def make(here):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_bytes(data)

    return make


def pickled(what, file="model/pytorch_model.bin", **options):
    """Leave a pickle in place of the safetensors file, or beside everything."""

    def make(here):
        if file.startswith("model/"):
            (here / "model/model.safetensors").unlink()
        torch.save(what, here / file, **options)

    return make


def zip_bomb(here):
    """A good state dict, compressed, with 64 MB of zeros that take up 64 kB."""
    torch.save({"a": torch.zeros(4)}, here / "stored.bin")
    with zipfile.ZipFile(here / "stored.bin") as stored, zipfile.ZipFile(here / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in stored.infolist():
            zeros = bytes(1 << 26) if entry.filename.endswith("data/0") else stored.read(entry)
            bomb.writestr(entry.filename, zeros)


def link_out(file):
    """Move a file out of the model's folder and leave a link to it."""

    def make(here):
        (here / "model" / file).rename(here / "elsewhere")
        (here / "model" / file).symlink_to(here / "elsewhere")

    return make


def config(file="model/config.json", **changes):
    """Change entries of a JSON file."""

    def make(here):
        (here / file).write_text(json.dumps(json.loads((here / file).read_text()) | changes))

    return make


def truncated(here):
    file = here / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def huge_tensor(here):
    header = b'{"a": {"dtype": "F32", "shape": [2684354560], "data_offsets": [0, 10737418240]}}'
    (here / "model/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def one_class(here):
    config(id2label={"0": "cat"}, label2id={"cat": 0})(here)
    tensors = load_file(here / "model/model.safetensors")
    tensors |= {name: tensors[name][:1].clone() for name in ("classifier.weight", "classifier.bias")}
    save_file(tensors, here / "model/model.safetensors")


FILE = "--architecture resnet20_cifar --image_mean 0 0 0 --image_std 1 1 1 --model_name_or_path"
CODE = r"model/pytorch_model.bin was not opened: it wants to run posix.mkdir, .*; ask its author for safetensors.*"
MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForImageClassification": "evil.EvilModel"}

CHECKPOINTS = [
    Case("pickle with code", "", CODE, pickled({"a": Code()})),
    Case("old pickle with code", "", CODE, pickled({"a": Code()}, _use_new_zipfile_serialization=False)),
    Case("pickle with code, info", "info model", CODE, pickled(Code())),
    Case("bare pickle with code", f"{FILE} e.pth", "e.pth was not opened: it wants to run .*", pickled(Code(), "e.pth")),
    Case(
        "zip bomb", f"{FILE} bomb.pth", r"bomb.pth was not opened: it unpacks to 67,\d+,\d+ bytes from \d\d,\d+.*", zip_bomb
    ),
    Case("memory bomb", f"{FILE} e.pth", r"e.pth: a would fill more memory than the file's [\d,]+ bytes: ask for .*",
         pickled({"a": torch.zeros(1).expand(1 << 40)}, "e.pth")),
    Case("sparse tensor", f"{FILE} e.pth", r"e.pth is no state dict, .* found 'a' \(Tensor\).*",
         pickled({"a": torch.zeros(1 << 40, layout=torch.sparse_coo)}, "e.pth")),
    Case("no tensor", f"{FILE} e.pth", r"e.pth is no state dict, .* found 'a' \(int\).*", pickled({"a": 1}, "e.pth")),
    Case("NaN weights", "", "model: NaN or infinite values in classifier.bias",
         weights(lambda t: t["classifier.bias"].fill_(float("nan")))),
    Case("infinite weights", "", "model: NaN or infinite values in classifier.bias",
         weights(lambda t: t["classifier.bias"].fill_(float("inf")))),
    Case("zero-norm selected weight", "", "classifier.weight has norm zero .* cannot move; exclude it",
         weights(lambda t: t["classifier.weight"].zero_())),
    Case("wrong shapes", "", r"model: .* of the wrong shape: classifier.bias \(7,\) instead of \(3,\)\): check .*",
         weights(lambda t: t.update({"classifier.bias": torch.zeros(7)}))),
    Case("extra keys", "", r"model: .*1 unexpected: evil\): check the architecture.*",
         weights(lambda t: t.update({"evil": torch.zeros(7)}))),
    Case("missing keys", "", r"model: .*1 missing: classifier.bias\): check the architecture.*",
         weights(lambda t: t.pop("classifier.bias"))),
    Case("fp8 weights", "", r"model/model.safetensors: quantised or complex weights, classifier.weight "
         r"\(torch.float8_e4m3fn\), cannot be purified: load .*",
         weights(lambda t: t.update({"classifier.weight": t["classifier.weight"].to(torch.float8_e4m3fn)}))),
    Case("complex weights", "", "model/model.safetensors: quantised or complex .*",
         weights(lambda t: t.update({"classifier.bias": torch.zeros(3, dtype=torch.complex64)}))),
    Case("integer weights", "", r"model/model.safetensors: quantised .*, classifier.weight \(torch.int8\), cannot .*",
         weights(lambda t: t.update({"classifier.weight": t["classifier.weight"].to(torch.int8)}))),
    Case("quantised by its config", "", "model is quantised, and .*: load the original",
         config(quantization_config={"quant_method": "fp8"})),
    Case("empty file", "", r"model/model.safetensors is no complete safetensors file \(.*\): fetch it again", content(b"")),
    Case("10 GB claimed header", "", "model/model.safetensors is no complete safetensors file .*: fetch it again",
         content(struct.pack("<Q", 10 << 30) + b"{}")),
    Case("10 GB claimed tensor", "", "model/model.safetensors is no complete safetensors file .*", huge_tensor),
    Case("truncated", "", "model/model.safetensors is no complete safetensors file .*: fetch it again", truncated),
    Case("no checkpoint at all", f"{FILE} n.pth", "n.pth is no state dict that torch.save wrote .*", content(b"no", "n.pth")),
    Case("network by its paper's name", "--architecture resnet20 --model_name_or_path n.pth",
         "unknown architecture 'resnet20': did you mean resnet20_cifar or .*", content(b"no", "n.pth")),
    Case("file without a network", "--model_name_or_path n.pth", "n.pth holds weights without their network: give its "
         "architecture, .*", content(b"no", "n.pth")),
    Case("another kind of file", f"{FILE} a.csv", "a.csv: unknown suffix '.csv'; expected .*", content(b"1,2", "a.csv")),
    Case("no such checkpoint", "--model_name_or_path ./absent", "no such file or folder: ./absent"),
    Case("link to weights elsewhere", "", "model: model.safetensors is a link out of the folder .*: put the file itself there",
         link_out("model.safetensors")),
    Case("link to a config elsewhere", "info model", "model: config.json is a link out .*", link_out("config.json")),
    Case("code in auto_map", "", r"model needs Python code of its repository \(auto_map in config.json\), which is never run.*",
         config(model_type="evil", auto_map=MAP)),
    Case("config.json without end", "", r"model: config.json is no JSON \(.*\)", content(b"[" * 100_000, "model/config.json")),
    Case("config.json is no text", "", r"model: config.json is no JSON \(.*\)", content(b"\xff\xfe", "model/config.json")),
    Case("config.json of another kind", "", "model: model_type 'gpt2' in config.json is no .*", config(model_type="gpt2")),
    Case("wrong type in config.json", "", "model: config.json cannot be used .*", config(hidden_size="big")),
    Case("impossible sizes in config.json", "", "model: .*", config(num_attention_heads=3)),
    Case("model of one class", "", "model has 1 class: a classifier tells at least 2 apart", one_class),
    Case("no image processor", "", "model has no image processor that transformers knows: .*",
         lambda here: (here / "model/preprocessor_config.json").unlink()),
    Case("no scale in the image processor", "", ".*needs a mean and a positive std for each of 3 channels.*",
         config("model/preprocessor_config.json", image_std=[0, 1, 1])),
    Case("victim.json of another kind", "measure model", "model/victim.json is no record of make_victim .*: make the .*",
         content(b"[]", "model/victim.json")),
    Case("purification.json of another kind", "push model --hub_model_id me/x", "model holds no README.md.*",
         content(b"[]", "model/purification.json")),
]  # fmt: skip


# Options -------------------------------------------------------------------------------------------------------------------


def options(text):
    """Write a configuration."""
    return content(text.encode("latin-1"), "o.yaml")


def laughs(here):
    lines = ["a: &a0 [x]"] + [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12)]
    (here / "o.yaml").write_text("\n".join([*lines, "epsilon: *a12"]))


def changed_model(change):
    """A model that was changed after it was loaded, as one in memory can be."""

    def load(*args, **kwargs):
        model = load_classifier(*args, **kwargs)
        change(model)
        return model

    return lambda monkeypatch: monkeypatch.setattr("d3_hf.models.load.load_classifier", load)


def freeze(model):
    model.classifier.requires_grad_(False)


def tie(model):
    model.second = nn.Linear(8, 3)
    model.second.weight = model.classifier.weight


CONFIGS = [
    Case("unknown option", "--lamda 3", "unknown argument '--lamda': did you mean --lambda_clean.*"),
    Case("unknown key in YAML", "o.yaml", "o.yaml: unknown option lamda_clean; did you mean lambda_clean.*",
         options("lamda_clean: 3")),
    Case("broken YAML", "o.yaml", "o.yaml is no YAML: .*", options("a: [1")),
    Case("YAML without end", "o.yaml", "o.yaml is no YAML: .*", options("[" * 5000)),
    Case("YAML that is no text", "o.yaml", "o.yaml is no YAML: .*", options("a: \xff\xfe")),
    Case("YAML that is a list", "o.yaml", "o.yaml is no mapping of option names to values", options("- 1")),
    Case("empty YAML", "o.yaml", "o.yaml is no mapping of option names to values", options("")),
    Case("YAML with an object", "o.yaml", "o.yaml is no YAML: .*", options("a: !!python/object/apply:os.mkdir ['ran']")),
    Case("YAML that multiplies", "o.yaml", "o.yaml: unknown options a, b0, .*", laughs),
    Case("no such YAML", "absent.yaml", "no configuration file absent.yaml"),
    Case("list for a number", "o.yaml", r"o.yaml: epsilon must be float \| None; got a list", options("epsilon: [1, 2]")),
    Case("nothing for a number", "o.yaml", "o.yaml: lambda_clean must be float; got None.*", options("lambda_clean: null")),
    Case("word for a number", "--epsilon many", r"argument --epsilon: invalid float value: 'many'.*"),
    Case("word for a number in YAML", "o.yaml", "argument --epsilon: invalid float value: 'many'.*", options("epsilon: many")),
    Case("fraction for a count", "o.yaml", r"o.yaml: retain_count must be int \| None; got 2.5, a float",
         options("retain_count: 2.5")),
    Case("number for a name", "o.yaml", r"o.yaml: save_strategy must be str; got False, a bool", options("save_strategy: no")),
    Case("word for a list", "o.yaml", r"o.yaml: class_names must be .*; got 'cat', a str", options("class_names: cat")),
    Case("words for numbers", "o.yaml", r"o.yaml: image_mean must be .*; got a list", options("image_mean: [a, b, c]")),
    Case("negative epsilon", "--epsilon=-0.1", "epsilon must be >= 0 nats and finite; got -0.1"),
    Case("lambda of zero", "--lambda_clean 0", "lambda_clean must be > 0 and finite; got 0.0"),
    Case("infinite lambda", "--lambda_clean inf", "lambda_clean must be > 0 and finite; got inf"),
    Case("negative learning rate", "--learning_rate=-1", "learning_rate must be at least 0 and finite; got -1.0"),
    Case("batches of nothing", "--per_device_train_batch_size 0", "per_device_train_batch_size must be at least 1 .*"),
    Case("negative seed", "--seed=-1", "seed must be at least 0 and finite; got -1"),
    Case("rail out of range", "--max_accuracy_drop 5", "max_accuracy_drop must be in .*as 0.05 for five points; got 5.0"),
    Case("unknown choice", "--hinge none", "argument --hinge: invalid choice: 'none' .*; --help lists the options"),
    Case("unknown choice in YAML", "o.yaml", "hinge must be one of sample, batch; got 'none'", options("hinge: none")),
    Case("label smoothing", "--label_smoothing_factor 0.1", "label_smoothing_factor must stay 0: the defence computes .*"),
    Case("unknown defence", "--defence magic", "unknown defence 'magic'; known: d3, .*"),
    Case("folder that holds no attack", "--attack images", "images holds no attack.json: it is no folder that .*"),
    Case("unknown attack", "--attack magic", "unknown attack 'magic'; known: badnets, .*"),
    Case("attack out of range", """--attack '{"name": "badnets", "size": 0}'""", "size must be an integer at least 1; got 0"),
    Case("attack on a class that is not there", """--attack '{"name": "badnets", "target_label": 3}'""",
         "target_label 3 is out of range: there are classes 0 to 2"),
    Case("empty target_modules", "o.yaml", "target_modules is empty; use 'head', .*", options("target_modules: []")),
    Case("target_modules that match nothing", "--target_modules absent", r"target_modules=\['absent'\] matches no module; "
         "linear layers are: .*classifier"),
    Case("over-broad target_modules", "o.yaml", r"target_modules='.\*' matches all of it, a ViTForImageClassification; "
         "only linear .*: narrow the pattern", options("target_modules: .*")),
    Case("target_modules that are no expression", "o.yaml", r"target_modules='\(' is not a regular expression: .*",
         options("target_modules: (")),
    Case("target_modules that repeat too often", "o.yaml", r"target_modules='.*' is not a regular expression: .*",
         options("target_modules: 'a{99999999999999999999}'")),
    Case("frozen selection", "", "classifier.weight is selected but frozen; set requires_grad or exclude it .*",
         patch=changed_model(freeze)),
    Case("tied selection", "", "classifier.weight is tied: classifier.weight and second.weight share a weight; untie .*",
         patch=changed_model(tie)),
    Case("half-precision selection", "", "classifier.weight is torch.bfloat16: small projections would vanish; load .*",
         patch=changed_model(lambda model: model.bfloat16())),
    Case("unknown key in a grid", "benchmark o.yaml", "o.yaml: unknown key victms; a grid has .*", options("victms: [a]")),
    Case("wrong type in a grid", "benchmark o.yaml", "o.yaml: defences must be dict.*; got 5, a int",
         options("{output_dir: out, dataset_name: images, victims: [model], victims_dir: ., defences: 5}")),
    Case("victim without a network", "victim --dataset_name images --output_dir out", "no network: give --architecture .*"),
    Case("poison ratio out of range", "victim --model_name_or_path model --dataset_name images --output_dir out --use_cpu "
         "--attack badnets --poison_ratio 2", ".*ratio.*2.*"),
]  # fmt: skip


# Surroundings --------------------------------------------------------------------------------------------------------------


def no_permission(monkeypatch):
    """As the system reports it to others than root."""
    monkeypatch.setattr(os, "access", lambda place, mode: False)


def no_space(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)


def closed_port(monkeypatch):
    """Nobody listens where the Hub should be."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def earlier_run(here):
    (here / "out").mkdir()
    (here / "out/purification.json").write_text("{}")
    (here / "out/README.md").write_text("an earlier run")


SURROUNDINGS = [
    Case("no permission", "", "output_dir out cannot be written: no permission in .*", code=1, patch=no_permission),
    Case("no disk", "", r"out could not be written \(.*No space left on device\): nothing of it was kept; .*run it again.*",
         code=1, patch=no_space),
    Case("a file where the output should go", "", "output_dir out cannot be made: out is a file", content(b"", "out")),
    Case("the output of another run", "", r"output_dir out holds the results of another run .*--overwrite_output_dir.*",
         earlier_run),
    Case("output into the source", "--output_dir model", "output_dir model is where the suspicious model lies, .*another"),
    Case("resuming from nothing", "--resume_from_checkpoint absent", r"absent is no whole checkpoint \(no such folder\).*"),
    Case("Hub id, offline", "--model_name_or_path me/vit", "me/vit is no local path .*reached: go online once", code=1),
    Case("Hub id, closed port", "info me/vit", "me/vit is no local path .*cannot be reached: go online once", code=1,
         patch=closed_port),
    Case("data set's Hub id, offline", "--dataset_name me/photos", "cannot load 'me/photos', .*Check the name, .*", code=1),
    Case("fp16 without a GPU", "--fp16", "fp16 is for a GPU and this run has none: use bf16, or leave it out"),
    Case("tf32 without a GPU", "--tf32 true", ".*tf32.*GPU.*", needs_no_gpu=True),
]  # fmt: skip
