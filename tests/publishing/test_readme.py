"""The owner's README and the source's licence survive a push; the card becomes a section, replaced by the next one."""

import pytest
import yaml
from fake_hub import Repository
from huggingface_hub import RepoCard
from tiny import FAST, tiny_samples, tiny_vit

from d3_hf import D3Config, D3Trainer, load_classifier
from d3_hf.models.source import Source
from d3_hf.publishing.hub import push_folder
from d3_hf.publishing.licences import UNKNOWN
from d3_hf.publishing.readme import BEGIN, END, FOLDER, merge_card, named_for, source_licence

CARD = """---
base_model: them/vit
base_model_relation: finetune
library_name: transformers
tags:
- purified
- d3_hf
model-index:
- name: run
  results: []
---

<!-- d3_hf: what stands from here on is replaced by the next push -->

# run

This image classifier was **purified**.

<!-- d3_hf: up to here -->"""
THEIRS = """---
license: other
license_name: their-licence
license_link: LICENSE
language:
- en
- no
datasets: cifar10
tags: vision
base_model: google/vit
library_name: keras
model-index:
- name: theirs
  results: [{accuracy: 0.99}]
---

# Their model

Trained by us. Citation:

---

the end.
"""


def parts(text):
    card = RepoCard(text)
    return card.data.to_dict(), card.text


def test_the_owners_text_and_metadata_stay_and_their_results_go():
    metadata, text = parts(merge_card(CARD, THEIRS, "them/vit"))
    assert text.strip().startswith("# Their model\n\nTrained by us. Citation:\n\n---\n\nthe end.\n\n" + BEGIN)
    assert "# Purification\n\nThis image classifier was **purified**." in text and text.strip().endswith(END)
    kept = {"license": "other", "license_name": "their-licence", "license_link": "LICENSE", "datasets": "cifar10"}
    assert kept.items() <= metadata.items() and metadata["language"] == ["en", "no"]
    assert metadata["tags"] == ["vision", "purified", "d3_hf"] and metadata["library_name"] == "transformers"
    assert metadata["base_model"] == "google/vit" and "base_model_relation" not in metadata  # no model is its own base
    assert metadata["model-index"] == [{"name": "run", "results": []}]
    measured_nothing = CARD.replace("model-index:\n- name: run\n  results: []\n", "")
    assert "model-index" not in parts(merge_card(measured_nothing, THEIRS, "them/vit"))[0]


def test_elsewhere_the_source_is_the_base_and_the_owners_licence_holds():
    card = CARD.replace("tags:", "license: mit\ntags:")
    metadata, _ = parts(merge_card(card, THEIRS, "me/vit"))
    assert metadata["base_model"] == "them/vit" and metadata["base_model_relation"] == "finetune"
    assert metadata["license"] == "other"
    assert parts(merge_card(card, None, "me/vit"))[0]["license"] == "mit"
    unlicensed = merge_card(card, "# Their model", "me/vit")
    assert parts(unlicensed)[0]["license"] == "mit" and "# Their model" in unlicensed


def test_the_next_push_replaces_its_own_section_alone():
    first = merge_card(CARD, THEIRS, "them/vit")
    edited = first.replace("the end.", "the very end.") + "\nAnd a last word.\n"
    again, text = parts(merge_card(CARD.replace("**purified**", "**purified** \\1 again"), edited, "them/vit"))
    assert text.count(BEGIN) == 1 and "**purified** \\1 again" in text and "**purified**." not in text
    assert "the very end." in text and text.strip().endswith("And a last word.")
    assert merge_card(CARD, first, "them/vit") == first and again["tags"] == ["vision", "purified", "d3_hf"]


def test_a_card_of_a_version_that_did_not_mark_it_is_replaced():
    unmarked = CARD.replace(f"{BEGIN}\n\n", "").replace(f"\n\n{END}", "\n")
    text = merge_card(CARD, unmarked.replace("**purified**", "**purified** long ago"), "me/vit")
    assert "long ago" not in text and "# run\n" in text
    assert merge_card(unmarked, None, "me/vit").rstrip() == CARD  # of a folder that an earlier version wrote
    assert "# Their own words" in merge_card(CARD, merge_card(CARD, None, "me/vit") + "# Their own words", "me/vit")


@pytest.mark.parametrize("metadata", ["a: [1", "- list", "a: b: c"])
def test_metadata_that_are_none_cost_the_text_nothing(metadata, caplog):
    text = merge_card(CARD, f"---\n{metadata}\n---\n# Their model\n", "me/vit")
    assert "# Their model" in text and yaml.safe_load(text.split("---\n")[1])["base_model"] == "them/vit"
    assert "are no YAML mapping and are not kept" in caplog.text


@pytest.mark.parametrize("text", ["# Their model\r\n\r\nTwo lines.\r\n", "---\r\nlicense: mit\r\n---\r\n# Their model\r\n"])
def test_a_readme_without_metadata_or_of_another_system(text):
    metadata, merged = parts(merge_card(CARD, text, "me/vit"))
    assert "# Their model" in merged and metadata.get("license") == ("mit" if "mit" in text else None)


def test_where_nothing_is_a_card_goes_up_byte_for_byte_and_again():
    assert merge_card(CARD, None, "me/vit") == CARD == merge_card(CARD, CARD, "me/vit")
    assert "base_model" not in parts(merge_card(CARD, None, "them/vit"))[0]  # no model is its own base


def test_a_card_without_a_repository_is_named_when_it_gets_one():
    card = CARD.replace("**purified**.", f'**purified**.\n\n    # run\n    pipeline(model="{FOLDER}")')
    metadata, text = parts(named_for(card, "run", "me/vit-2"))
    assert "# vit-2\n" in text and 'model="me/vit-2"' in text and metadata["model-index"][0]["name"] == "vit-2"
    assert "\n    # run\n" in text  # only the title
    chosen = parts(named_for(card.replace("# run\n", "# My name\n", 1), "run", "me/vit-2"))[1]
    assert "# My name\n" in chosen and "# vit-2" not in chosen
    assert named_for(CARD, "run", "me/vit-2") == CARD  # it loads nothing
    other = named_for(card, "run", "me/first")
    assert named_for(other, "run", "me/first") == other
    assert parts(named_for(other, "run", "me/vit-2")) == (metadata, text)  # it was made for another repository


@pytest.mark.parametrize("loads", ["AutoModel.from_pretrained(", "load_encoder("])
def test_so_is_that_of_an_encoder(loads):
    card = CARD.replace("**purified**.", f'**purified**.\n\n    encoder = {loads}"{FOLDER}")')
    assert f'{loads}"me/dinov2")' in named_for(card, "run", "me/dinov2")


def test_data_sets_are_added_to_the_owners():
    card = CARD.replace("tags:", "datasets:\n- me/trusted\ntags:")
    assert parts(merge_card(card, THEIRS, "them/vit"))[0]["datasets"] == ["cifar10", "me/trusted"]


def test_that_a_licence_is_unknown_is_nothing_to_tell_the_owner_and_gives_way():
    unknown = CARD.replace("tags:", "license: other\nlicense_name: unknown\ntags:")
    for theirs in ("# Their model", THEIRS):
        metadata, _ = parts(merge_card(unknown, theirs, "me/vit"))
        assert metadata.get("license_name") == (None if theirs == "# Their model" else "their-licence")
    first = merge_card(unknown, None, "me/vit")
    for text in (first, merge_card(unknown, first, "me/vit")):
        assert UNKNOWN.items() <= parts(text)[0].items()
    licensed = parts(merge_card(CARD.replace("tags:", "license: mit\ntags:"), first, "me/vit"))[0]
    assert licensed["license"] == "mit" and "license_name" not in licensed


# From the Hub and from a folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(own_hub, tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path / "vit"), model.image_processor.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "README.md").write_text(THEIRS)
    own_hub.publish("them/vit", tmp_path / "vit")
    return tmp_path / "vit"


def purified(source, folder):
    trainer = D3Trainer(load_classifier(source), D3Config(str(folder), **FAST), tiny_samples())
    trainer.train()
    trainer.save_model()
    return folder


def test_a_pull_request_keeps_readme_and_licence(own_hub, theirs, tmp_path):
    push_folder(purified("them/vit", tmp_path / "run"), create_pr=True)
    ((_, files),) = own_hub.repos["them/vit"].pulls
    metadata, text = parts(files["README.md"].decode())
    assert metadata["license"] == "other" and metadata["license_link"] == "LICENSE" and metadata["base_model"] == "google/vit"
    assert "Trained by us." in text and "was **purified** with" in text and files["README.md"].decode() in own_hub.validated


def test_a_new_repository_gets_the_licence_of_the_source(own_hub, theirs, tmp_path):
    push_folder(purified("them/vit", tmp_path / "run"), "me/vit")
    metadata, text = parts(own_hub.repos["me/vit"].commits[-1][1]["README.md"].decode())
    revision = own_hub.repos["them/vit"].commits[-1][0]
    link = f"{own_hub.endpoint}/them/vit/blob/{revision}/LICENSE"
    assert (metadata["license"], metadata["license_name"], metadata["license_link"]) == ("other", "their-licence", link)
    assert "Trained by us." not in text and "datasets" not in metadata


def test_so_does_what_comes_from_a_downloaded_folder(theirs, tmp_path):
    metadata, _ = parts((purified(theirs, tmp_path / "run") / "README.md").read_text())
    assert metadata["license"] == "other"


@pytest.mark.parametrize(
    "source",
    [
        None,
        Source("module", "Net"),
        Source("file", "weights.pth"),
        Source("folder", "absent"),
        Source("hub", "them/unheard", "0" * 40),
    ],
)
def test_a_licence_that_is_not_known_stops_nothing(own_hub, source):
    own_hub.repos["them/other"] = Repository(private=False, commits=[])
    assert source_licence(source) == {}


def test_what_was_downloaded_has_the_licence_of_where_it_came_from(own_hub, theirs, tmp_path):
    link = f"{own_hub.endpoint}/them/vit/blob/main/LICENSE"
    found = {"license": "other", "license_name": "their-licence", "license_link": link}
    assert source_licence(Source("file", "weights.pth"), "them/vit") == found
    (tmp_path / "bare").mkdir()
    assert source_licence(Source("folder", str(tmp_path / "bare")), "them/vit") == found
    (tmp_path / "bare" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert source_licence(Source("folder", str(tmp_path / "bare")), "them/vit") == {"license": "mit"}
