"""Which public models a classifier may descend from: by its folder's card, by its architecture, and by nothing else."""

import pytest
import torch
from every_defence import build
from tiny import SIZE, tiny_dinov2, tiny_resnet, tiny_timm_vit, tiny_vit
from tiny_trained import base_of, differing, trained
from transformers import AutoConfig

from d3_hf.models import likely_bases as found
from d3_hf.models import load_classifier
from d3_hf.models.likely_bases import PUBLIC, likely_bases, of_its_architecture
from d3_hf.models.source import Source


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("vit", {}, ["google/vit-base-patch16-224-in21k", "google/vit-base-patch16-224"]),
        ("vit", {"patch_size": 32}, ["google/vit-base-patch32-224-in21k"]),
        ("vit", {"patch_size": 8}, []),
        ("dinov2", {"hidden_size": 384}, ["facebook/dinov2-small"]),
        ("dinov2_with_registers", {}, ["facebook/dinov2-with-registers-base"]),
        ("deit", {"hidden_size": 192}, ["facebook/deit-tiny-distilled-patch16-224"]),
        ("swin", {"depths": [2, 2, 18, 2], "embed_dim": 96}, ["microsoft/swin-small-patch4-window7-224"]),
        ("swin", {}, ["microsoft/swin-tiny-patch4-window7-224"]),
        ("convnext", {}, ["facebook/convnext-tiny-224"]),
        ("resnet", {}, []),
    ],
)
def test_by_architecture(kind, options, names):
    patch = {"patch_size": 14} if kind.startswith("dinov2") else {}
    assert of_its_architecture(AutoConfig.for_model(kind, **patch | options)) == names


def test_every_entry_is_reached_by_a_network_of_its_kind():
    for kind, needed, ids in PUBLIC:
        assert set(ids) <= set(of_its_architecture(AutoConfig.for_model(kind, **needed)))


def test_timm_names_itself():
    assert likely_bases(tiny_timm_vit()) == [f"timm/{tiny_timm_vit().config.architecture}"]


CARDS = {
    "---\nbase_model: them/base\n---\n": ["them/base"],
    "---\nbase_model: [them/base, us/other]\n---\n": ["them/base", "us/other"],
    "---\nbase_model: {a: 1}\n---\n": [],
    "---\nbase_model: [1, [2]]\n---\n": [],
    "---\nbase_model: ./outputs/my/base\n---\n": [],
    '---\nbase_model: "them/\\e[31mbase"\n---\n': [],
    "---\nbase_model: [\n---\n": [],
    "no metadata": [],
}


@pytest.mark.parametrize("card", CARDS)
def test_by_the_card_of_the_folder(card, tmp_path):
    tiny_dinov2().save_pretrained(tmp_path)
    tiny_dinov2().image_processor.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(card)
    assert likely_bases(load_classifier(tmp_path)) == CARDS[card]


def test_what_did_not_come_from_a_folder_has_no_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("---\nbase_model: them/base\n---\n")
    model = tiny_resnet()
    for source in (None, Source("file", "."), Source("hub", ".")):
        model.source = source
        assert "them/base" not in likely_bases(model)


@pytest.fixture
def known(monkeypatch, tmp_path):
    """As if folders were public models of tiny_vit's architecture: one that is absent, one of other weights, and the base."""
    other = tiny_vit()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.save_pretrained(tmp_path / "other")
    places = [str(tmp_path / "absent"), str(tmp_path / "other"), base_of(tiny_vit)]
    monkeypatch.setattr(found, "PUBLIC", [("vit", {"hidden_size": tiny_vit().config.hidden_size}, places)])
    return places


def test_the_base_is_found_by_its_weights(known):
    base = found.find_base(trained(tiny_vit), (SIZE, SIZE))
    assert base.source.name == known[-1] and 0 < base.relative_distance < 1


def test_a_base_that_is_not_found_says_why_of_each(known):
    known.pop()
    with pytest.raises(ValueError, match="is its base and within reach .*absent.*; .*other.*name it as base_model"):
        found.find_base(trained(tiny_vit), (SIZE, SIZE))
    with pytest.raises(ValueError, match="no public model of this architecture is known here"):
        found.find_base(trained(tiny_resnet), (SIZE, SIZE))


def test_the_card_of_the_suspect_is_not_believed(known, tmp_path):
    model, folder = trained(tiny_vit), tmp_path / "suspect"
    folder.mkdir()
    (folder / "README.md").write_text("---\nbase_model: them/base\n---\n")
    model.source = Source("folder", str(folder))
    assert likely_bases(model)[0] == "them/base" and found.find_base(model, (SIZE, SIZE)).source.name == known[-1]


def test_d3_and_base_tuning_start_from_what_was_found(known, tmp_path):
    for name in ("d3", "base_tuning"):
        trainers = [
            build(name, tmp_path / f"{name}{k}", trained(tiny_vit), base_model=base)
            for k, base in enumerate(("auto", known[-1]))
        ]
        for trainer in trainers:
            trainer.start()
        assert differing(*(trainer.model for trainer in trainers)) == []
        with pytest.raises(ValueError, match="base_revision is for a base that is named"):
            build(name, tmp_path / "revision", trained(tiny_vit), base_model="auto", base_revision="main")
