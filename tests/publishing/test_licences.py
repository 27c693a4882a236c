"""Licences of cards: codes of the Hub's, others by name, unknown ones said to be unknown."""

import pytest
from huggingface_hub import ModelCard
from tiny import FAST, tiny_samples, tiny_vit

from d3_hf import D3Config, D3Trainer
from d3_hf.models.source import Source
from d3_hf.options.parser import Parser
from d3_hf.publishing.card_arguments import CardArguments
from d3_hf.publishing.licences import UNKNOWN, licence_of


@pytest.mark.parametrize(
    ("given", "metadata"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        ("My Company's licence", {"license": "other", "license_name": "my-company-s-licence"}),
        ("other:apache-2.1", {"license": "other", "license_name": "apache-2.1"}),
        ("unknown", UNKNOWN),
        ("other", UNKNOWN),
    ],
)
def test_a_licence_is_a_code_or_other_with_a_name(given, metadata):
    assert licence_of(given) == metadata


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "appache-2.0"], "did you mean apache-2.0"),
        (["--license", " "], "license is empty: give a code of the Hub's"),
        (["--license", "other:"], "license is empty"),
        (["--finetuned_from", "weights.pth"], "finetuned_from=weights.pth is no Hub id"),
    ],
)
def test_what_is_no_licence_and_no_hub_id_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Parser([CardArguments]).read(options)


def test_a_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "vit").mkdir(parents=True)
    with pytest.raises(ValueError, match="finetuned_from=models/vit is no Hub id"):
        CardArguments(finetuned_from="models/vit")
    assert CardArguments(finetuned_from="them/vit").finetuned_from == "them/vit"


def trainer(folder, source=None):
    model = tiny_vit()
    model.source = source
    return D3Trainer(model, D3Config(str(folder), **FAST), tiny_samples())


def test_an_unknown_licence_is_said_to_be_unknown(tmp_path):
    made = trainer(tmp_path, Source("file", "weights.pth", sha256={"weights.pth": "0" * 64}))
    made.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert "## Licence\n\nNot known: the source names none, or could not be asked. Ask its owner" in card.text


def test_a_licence_that_is_given_goes_before_the_sources(tmp_path):
    (tmp_path / "source").mkdir()
    theirs = "---\nlicense: other\nlicense_name: theirs\nlicense_link: https://there.org/LICENSE\n---\n"
    (tmp_path / "source" / "README.md").write_text(theirs)
    made = trainer(tmp_path / "run", Source("folder", str(tmp_path / "source"), sha256={}))
    assert "## Licence\n\nThat of the source: `theirs` (https://there.org/LICENSE).\n" in made.card().text
    made.describe(license="mit")
    made.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "mit" and card.data.get("license_name") is None and card.data.get("license_link") is None
    assert "## Licence\n\nThat of the source: `mit`.\n" in card.text
    with pytest.raises(ValueError, match="did you mean mit"):
        made.push_to_hub(license="miit")
