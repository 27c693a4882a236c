"""Images that are broken, strange or too few: rows of the table, as in hostile.py. Strange ones are legal and are purified."""

import shutil
import struct
import zlib

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value
from hostile import NAMES, Case, content
from pictures import encoded, noise
from PIL import Image

ALL = "--retain_count 12"  # every training image


def good_images(here):
    """Four training and two test images of each class."""
    for split, count in (("train", 4), ("test", 2)):
        for name in NAMES:
            folder = here / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed = 100 * (split == "test") + 10 * NAMES.index(name) + number
                (folder / f"{number}.png").write_bytes(encoded(noise(16, 16, 3, seed=seed)))


def picture(data, suffix="png"):
    """Add a picture to the training images."""
    return content(data, f"images/train/cat/strange.{suffix}")


def header(width, height):
    """A PNG of so many pixels and hardly any bytes."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(64))),
        (b"IEND", b""),
    )
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def animation():
    frames = [Image.fromarray(noise(16, 16, 3, seed=seed)) for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def keep(*patterns):
    """Remove all images but these."""

    def make(here):
        kept = {file for pattern in patterns for file in (here / "images").glob(pattern)}
        for file in (here / "images").rglob("*.png"):
            if file not in kept:
                file.unlink()

    return make


def without_splits(here):
    (here / "images/train").rename(here / "train")
    shutil.rmtree(here / "images")
    (here / "train").rename(here / "images")


def only_cats(here):
    for split in ("train", "test"):
        for name in NAMES[1:]:
            shutil.rmtree(here / "images" / split / name)


def renamed(here):
    for split in ("train", "test"):
        (here / "images" / split / "cat").rename(here / "images" / split / "ship")


def all_alike(here):
    for file in (here / "images/train").rglob("*.png"):
        file.write_bytes(encoded(noise(16, 16, 3, seed=7)))


def duplicates(here):
    shutil.copy(here / "images/train/dog/1.png", here / "images/test/dog/1.png")


def table(labels, feature=None):
    """A parquet file with these labels; ``feature`` None: without any."""

    def make(here):
        rows = [{"bytes": encoded(noise(16, 16, 3, seed=row)), "path": None} for row in range(len(labels))]
        columns = {"image": rows} | ({"label": labels} if feature else {})
        features = {"image": datasets.Image()} | ({"label": feature} if feature else {})
        Dataset.from_dict(columns, features=Features(features)).to_parquet(here / "t.parquet")

    return make


def beyond_its_classes(here):
    """Labels that the file's own list of classes does not have; the library would not write them."""
    table([0, 1, 2, 5], Value("int64"))(here)
    columns = datasets.load_dataset("parquet", data_files=str(here / "t.parquet"), split="train").data
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    Dataset(columns, DatasetInfo(features=features)).to_parquet(here / "t.parquet")


def plain_bytes(here):
    """Pictures as another library than datasets writes them."""
    picture = {"bytes": encoded(noise(16, 16, 3)), "path": None}
    Dataset.from_dict({"picture": [picture] * 4, "label": [0, 1, 2, 0]}).to_parquet(here / "t.parquet")


TABLE = "--dataset_name t.parquet --retain_count 2"
DONE = r"classifier"  # what moved
STRANGE = r"cannot decode row \d+ of split 'train' \(.*strange\.\w+\): .*replace the picture or leave it out"

DATA = [
    Case("no images", "", ".*images.*", lambda here: shutil.rmtree(here / "images") or (here / "images").mkdir()),
    Case("no such folder", "--dataset_name ./absent", "no such file or folder: absent"),
    Case("an empty test split", "", ".*", keep("train/*/*.png"), code=0),
    Case("folder of one class", "", "found no label column; .*; a folder of images takes labels from .* two or more classes",
         only_cats),
    Case("table of one class", TABLE, r"the dataset has 1 classes \(cat\), the model 3 .*",
         table([0] * 4, ClassLabel(names=["cat"]))),
    Case("classes of other names", "", "class 0 is 'dog' in the dataset and 'cat' in the model; .*", renamed),
    Case("fewer images than classes", "--retain_count 2", "the retain set of 2 images has none of: .*", code=0),
    Case("more images than there are", "--retain_count 13", "a retain set must have between 1 and all 12 images.*"),
    Case("no retain set", "--retain_count 0", "a retain set must have between 1 and all 12 images.*"),
    Case("fraction out of range", "--retain_fraction 1.5", "give either fraction or count of the retain set.*"),
    Case("negative seed of the retain set", "--retain_seed=-1", "retain_seed must be at least 0; got -1"),
    Case("no test images", "--max_test_images 0", "max_test_images must be at least 1; got 0"),
    Case("no such split", "--train_split training", "images has no split 'training'; it has train, test"),
    Case("no such split to measure on", "--test_split tset", "images has no split 'tset'; it has train, test"),
    Case("folder without splits", "", r"no separate split 'test': measuring on its rest of train[\s\S]*fewer than 10 images",
         without_splits, code=0),
    Case("nothing left to measure on", ALL, "images has no split 'test' and the retain set is all of 'train': nothing is .*",
         without_splits),
    Case("labels out of range", TABLE, r".*1 rows whose label .*not in \[0, 3\), the first is row 3: leave them out.*",
         beyond_its_classes),
    Case("more labels than classes", TABLE, r"the dataset has 5 classes \(0, 1, 2, 3, 4\), the model 3 .*",
         table([0, 1, 2, 3, 4], Value("int64"))),
    Case("labels with a gap", TABLE, r"label column 'label' holds integers other than 0..k-1 .*: cast it .*",
         table([0, 1, 5, 0], Value("int64"))),
    Case("labels that are other words", TABLE, "class 2 is 'ship' in the dataset and 'frog' in the model; .*",
         table(["cat", "dog", "ship", "cat"], Value("string"))),
    Case("labels missing", TABLE, r".*1 rows whose label is missing .*the first is row 1: leave them out.*",
         table([0, None, 2, 1], ClassLabel(names=NAMES))),
    Case("parquet without a label column", TABLE, "found no label column; the dataset has image .*", table([0] * 4)),
    Case("pictures as plain bytes", TABLE, "t.parquet: column 'picture' holds pictures as plain bytes, .*: write .*",
         plain_bytes),
    Case("parquet that is none", TABLE, "t.parquet cannot be read as a data set .*: it is damaged .*",
         content(b"PAR1 not really", "t.parquet")),
    Case("truncated JPEG", ALL, STRANGE, picture(encoded(noise(40, 40, 3), "JPEG")[:900], "jpg")),
    Case("picture that is text", ALL, STRANGE, picture(b"no picture")),
    Case("picture of no bytes", ALL, STRANGE, picture(b"")),
    Case("decompression bomb", ALL, STRANGE, picture(header(60_000, 60_000))),
    Case("half a decompression bomb", ALL, STRANGE, picture(header(30_000, 4_000))),
    Case("floating-point picture", ALL, STRANGE,
         picture(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "tiff")),
    Case("1x1 with a trigger", "--attack badnets", "badnets: a patch of 3x3 pixels, .* does not fit an image of 1x1; lower .*",
         content(encoded(noise(1, 1, 3)), "images/test/dog/1.png")),
    Case("1x1", ALL, DONE, picture(encoded(noise(1, 1, 3))), 0),
    Case("20,000x10", ALL, DONE, picture(encoded(noise(10, 20_000, 3))), 0),
    Case("10x20,000", ALL, DONE, picture(encoded(noise(20_000, 10, 3))), 0),
    Case("CMYK", ALL, DONE, picture(encoded(Image.frombytes("CMYK", (16, 16), noise(16, 16, 4).tobytes()), "JPEG"), "jpg"), 0),
    Case("RGBA", ALL, DONE, picture(encoded(noise(16, 16, 4))), 0),
    Case("16-bit", ALL, DONE, picture(encoded(Image.fromarray(noise(16, 16).astype(np.uint16) * 257))), 0),
    Case("animated", ALL, DONE, picture(animation(), "gif"), 0),
    Case("retain images in the test set", ALL, "1 of the 12 images of the retain set are also in the test set", duplicates, 0),
    Case("all images alike", ALL, "11 of the 12 images of the retain set are copies of others", all_alike, 0),
]  # fmt: skip
