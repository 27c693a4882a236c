"""Commands of the README and of pages beside it, and its Python, run in a folder where their names stand for small things."""

import runpy
import shlex
import shutil
from pathlib import Path

import datasets
import pages
import pytest
import torch
import yaml
from fake_hub import logged_in
from pages import DOCS, README
from pictures import encoded
from places import ROOT
from tiny import CLASSES, tiny_vit
from tiny import SIZE as SIDE
from transformers import ViTConfig, ViTForImageClassification

from d3_hf import cli
from d3_hf.models import new_model

# What these pages show is run, in this order; what others do is parsed (tests/docs/test_commands.py).
RUN = ("quick-start", "victims", "benchmark", "results")
TEXTS = [README.read_text(), *((DOCS / f"{page}.md").read_text() for page in RUN)]
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
KEPT = ("twin", "badnets", "blended-sam3", "twin-1", "twin-33", "badnets-1")
SMALL = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True}


def commands():
    """The commands of the pages' ``bash`` blocks, each once, without those of Slurm."""
    found = {shlex.join(argv): argv for text in TEXTS for argv in pages.commands(text)}
    return [argv for argv in found.values() if argv[0] != "sbatch"]


def test_nothing_but_commands_that_are_known():
    assert {argv[0] for argv in commands()} == {"accelerate", "python", "d3-hf"} and len(commands()) > 8


def run(argv):
    """Run a command in this process; its exit code."""
    if argv[0] == "d3-hf":
        arguments, script = argv[1:], None
    else:
        launched = argv[2:] if argv[:2] == ["accelerate", "launch"] else argv[1:]
        script, *arguments = launched
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", [script or "d3-hf", *arguments])
        if script:
            runpy.run_path(script, run_name="__main__")
        else:
            cli.main()
    return ended.value.code


def coloured(count, names, side):
    """Images whose colour tells the class, as rows of a data set."""
    labels = torch.arange(count) % len(names)
    shades = 80 * torch.stack([labels % 3, labels // 3 % 3, labels // 9], 1)
    noise = torch.randint(0, 60, (count, side, side, 3), generator=torch.Generator().manual_seed(0))
    pixels = (shades[:, None, None] + noise).to(torch.uint8).numpy()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    files = [{"bytes": encoded(p), "path": None} for p in pixels]
    return datasets.Dataset.from_dict({"image": files, "label": labels.tolist()}, features=features)


def classifier(folder, names, side):
    names = dict(enumerate(names))
    config = ViTConfig(
        image_size=side, patch_size=side // 2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=names, label2id={name: label for label, name in names.items()},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    tiny_vit().image_processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the README's names stand for, and its recipes with fewer steps, victims and methods."""
    folder = tmp_path_factory.mktemp("readme")
    shapes = [f"shape {number}" for number in range(CLASSES)]
    for where, names, train in (("uoft-cs/cifar10", CIFAR, 7700), ("path/to/images", shapes, 620)):
        (folder / where).mkdir(parents=True)
        for split, count in (("train", train), ("test", 60)):
            coloured(count, names, SIDE).to_parquet(folder / where / f"{split}.parquet")
    classifier(folder / "me/suspicious-vit", shapes, SIDE)
    for where in ("path/to/classifier", "path-or-id"):
        classifier(folder / where, CIFAR, SIDE)
    resnet = new_model(CIFAR, "resnet20_cifar", [0.5] * 3, [0.5] * 3, 32)
    torch.save(resnet.timm_model.state_dict(), folder / "resnet20-12fca82f.th")
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / "recipes" / "configs").glob("fire_drill_*.yaml"):
        guard = {} if file.stem.endswith("victim") else {"max_accuracy_drop": 1}
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | SMALL | guard))
    for name in ("victims", "zoo"):
        shrink_set(folder / "recipes" / f"{name}.yaml")
    shrink_grid(folder / "recipes" / "grids" / "cpu.yaml", "cifar10-resnet20/badnets")
    shrink_grid(folder / "recipes" / "grids" / "sam.yaml", "cifar10-resnet20-hardened/blended-sam3")
    zoo = folder / "recipes" / "grids" / "zoo.yaml"
    zoo.write_text(
        yaml.safe_dump(yaml.safe_load(zoo.read_text()) | {"retain": {"40 images": {"count": 40}}, "test_images": 60})
    )
    return folder


def shrink_set(file):
    content = yaml.safe_load(file.read_text())
    for group in content["groups"].values():
        group["base"] |= SMALL
        group["victims"] = {name: group["victims"][name] | SMALL for name in KEPT if name in group["victims"]}
    file.write_text(yaml.safe_dump(content))


def shrink_grid(file, victim):
    content = yaml.safe_load(file.read_text())
    content["victims"], content["common"] = [victim], content["common"] | SMALL
    content["defences"] = {name: content["defences"][name] for name in ("D3", "FT")}
    file.write_text(yaml.safe_dump(content))


@pytest.fixture
def hub(place, monkeypatch):
    monkeypatch.chdir(place)
    with logged_in(monkeypatch) as server:
        yield server


def test_every_command_runs(hub, capfd):
    for argv in commands():
        if "--output_dir" in argv:  # two commands may show two ways to the same
            shutil.rmtree(argv[argv.index("--output_dir") + 1], ignore_errors=True)
        code = run(argv)
        assert code in (0, None), f"{shlex.join(argv)}\n{capfd.readouterr().err[-2000:]}"
    assert hub.repos["me/model-purified"].private


def test_the_python_runs(hub):
    ((_, source),) = pages.blocks(TEXTS[0], "python")
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    assert Path("out/model.safetensors").is_file() and list(hub.repos) == ["me/out"]
