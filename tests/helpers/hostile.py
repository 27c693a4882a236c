"""For the test_hostile files: what spoils a folder with a good checkpoint ``model`` and good ``images`` of three classes."""

import hashlib
import json
import os
import struct
import zipfile

import torch
from pictures import encoded, noise
from safetensors.torch import load_file, save_file
from tiny import tiny_vit

NAMES = ("cat", "dog", "frog")


def good_model(here):
    """A tiny ViT for the three classes."""
    model = tiny_vit()
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: number for number, name in enumerate(NAMES)}
    model.save_pretrained(here / "model"), model.image_processor.save_pretrained(here / "model")


def good_images(here):
    """Four training and two test images of each class."""
    for split, count in (("train", 4), ("test", 2)):
        for name in NAMES:
            folder = here / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed = 100 * (split == "test") + 10 * NAMES.index(name) + number
                (folder / f"{number}.png").write_bytes(encoded(noise(16, 16, 3, seed=seed)))


def contents(folder):
    """What lies in a folder: the digest of each file, where each link leads, and the folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        found[name] = os.readlink(path) if path.is_symlink() else digest
    return found


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def content(data, file="model/model.safetensors"):
    """Replace a file's bytes."""

    def spoil(here):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_bytes(data)

    return spoil


def weights(change):
    """Change the tensors of the checkpoint."""

    def spoil(here):
        tensors = load_file(here / "model/model.safetensors")
        change(tensors)
        save_file(tensors, here / "model/model.safetensors")

    return spoil


def config(file="model/config.json", **changes):
    """Change entries of a JSON file."""

    def spoil(here):
        (here / file).write_text(json.dumps(json.loads((here / file).read_text()) | changes))

    return spoil


def pickled(what, file):
    """Leave a pickle."""
    return lambda here: torch.save(what, here / file)


def pickle_with_code(here):
    """Leave a pickle in place of the safetensors file."""
    (here / "model/model.safetensors").unlink()
    torch.save({"a": Code()}, here / "model/pytorch_model.bin")


def zip_bomb(here):
    """A good state dict, compressed, with 64 MB of zeros that take up 64 kB."""
    torch.save({"a": torch.zeros(4)}, here / "stored.bin")
    with zipfile.ZipFile(here / "stored.bin") as stored, zipfile.ZipFile(here / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in stored.infolist():
            zeros = bytes(1 << 26) if entry.filename.endswith("data/0") else stored.read(entry)
            bomb.writestr(entry.filename, zeros)


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


def link_out(file):
    """Move a file out of the model's folder and leave a link to it."""

    def spoil(here):
        (here / "model" / file).rename(here / "elsewhere")
        (here / "model" / file).symlink_to(here / "elsewhere")

    return spoil


def picture(data, suffix="png"):
    """Add a picture to the training images."""
    return content(data, f"images/train/cat/strange.{suffix}")
