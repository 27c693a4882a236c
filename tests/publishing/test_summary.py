"""The outcome in a sentence, guard rails in a table, options that differ, and the floor of a card."""

import json

import jsonschema
import pytest
from places import ROOT
from tiny import FAST, tiny_samples, tiny_vit

from d3_hf import D3Config, D3Trainer
from d3_hf.evaluation.paired import PairedTable
from d3_hf.publishing.manifest import SCHEMA, changed_options
from d3_hf.publishing.report import Report
from d3_hf.publishing.summary import encoder_headline, headline, rails_table

SCHEMA_FILE = ROOT / "d3_hf" / "publishing" / "schemas" / "purification.schema.json"


def results(both_right, lost, gained, both_wrong, **rates):
    table = PairedTable(both_right, lost, gained, both_wrong)
    found = table.before.as_dict("accuracy_before") | table.after.as_dict("accuracy_after") | table.as_dict("accuracy_drop")
    for rate, (before, after) in rates.items():
        found |= {f"{rate}_before": before, f"{rate}_after": after}
    return found


def test_with_a_known_trigger_the_first_sentence_is_about_it():
    found = results(344, 5, 2, 9, asr=(0.9444, 0.0), ra=(0.0123, 0.91))
    assert headline(found, {"name": "badnets", "target_label": 0}) == (
        "Known trigger (badnets): ASR 94.4 % to 0.0 %, RA 1.2 % to 91.0 %; accuracy 96.9 % to 96.1 %, within chance on 360 "
        "images (p = 0.45)."
    )


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((80, 10, 0, 10), "accuracy 90.0 % to 80.0 %, a fall beyond chance on 100 images (p = 0.002)."),
        ((80, 0, 10, 10), "accuracy 80.0 % to 90.0 %, a rise beyond chance on 100 images (p = 0.002)."),
        ((60, 40, 0, 0), "accuracy 100.0 % to 60.0 %, a fall beyond chance on 100 images (p < 0.001)."),
        ((90, 0, 0, 10), "accuracy 90.0 % to 90.0 %, within chance on 100 images (p = 1)."),
        ((80, 5, 0, 15), "accuracy 85.0 % to 80.0 %, within chance on 100 images (p = 0.062)."),  # 2 / 2^5
        ((80, 6, 0, 14), "accuracy 86.0 % to 80.0 %, a fall beyond chance on 100 images (p = 0.031)."),
    ],
)
def test_without_a_trigger_it_says_what_the_paired_test_does_and_no_more(counts, said):
    found = headline(results(*counts), None)
    assert found == f"No trigger was known: {said} What a trigger does to the model was not measured."


def test_an_earlier_record_without_the_test_has_no_verdict():
    found = {name: value for name, value in results(80, 10, 0, 10).items() if "drop" not in name}
    assert "accuracy 90.0 % to 80.0 %, on 100 images." in headline(found, None)


def test_rails_are_told_with_their_outcome():
    rails = [
        {"name": "max_accuracy_drop", "limit": 0.05, "found": 0.0083, "holds": True, "is_certain": True},
        {"name": "max_accuracy_drop", "limit": 0.05, "found": 0.06, "holds": False, "is_certain": False},
        {"name": "min_agreement", "limit": 0.9, "found": 0.85, "holds": False, "is_certain": True},
    ]
    assert rails_table(rails).splitlines()[2:] == [
        "| fall of ACC, at most (`max_accuracy_drop`) | 5.0 points | 0.8 points | held |",
        "| fall of ACC, at most (`max_accuracy_drop`) | 5.0 points | 6.0 points | **broken**, but the images cannot tell |",
        "| predictions that stay, at least (`min_agreement`) | 90.0 % | 85.0 % | **broken** |",
    ]


def of_encoder(**rates):
    return {probe: {**rates, "accuracy_n": 90} for probe in ("linear", "knn")}


def test_an_encoders_outcome_is_told_by_both_probes():
    found = {"before": of_encoder(accuracy=0.9, asr=0.8, ra=0.1), "after": of_encoder(accuracy=0.85, asr=0.05, ra=0.8)}
    outcome = "ASR 80.0 % to 5.0 %, RA 10.0 % to 80.0 %, accuracy 90.0 % to 85.0 %"
    told = encoder_headline(found, {"name": "badencoder"})
    assert told == f"Known trigger (badencoder): by linear probe {outcome}; by kNN {outcome}."
    told = encoder_headline({"before": of_encoder(accuracy=0.9), "after": of_encoder(accuracy=0.85)}, None)
    assert told.startswith("No trigger was known: by linear probe accuracy 90.0 % to 85.0 %; by kNN accuracy")
    assert told.endswith("What a trigger does to the encoder was not measured.")


# In the card ---------------------------------------------------------------------------------------------------------------


def trainer(folder, **options):
    return D3Trainer(tiny_vit(), D3Config(str(folder), **(FAST | options)), tiny_samples())


def test_only_what_differs_from_its_default_is_listed_and_what_the_rule_settled_by_its_value(tmp_path):
    made = trainer(tmp_path, lambda_clean=7.5, horizontal_flip=False, cutmix=0)  # which the rule would set to 1
    assert set(changed_options(made.args, made.schedule["options"])) == {"lambda_clean", "max_steps", "use_cpu", "cutmix"}
    text = made.card().text
    assert "| `lambda_clean` | `7.5` |" in text and "| `max_steps` | `2` |" in text
    assert "| `horizontal_flip`" not in text and "| `learning_rate` |" not in text and "| `seed`" not in text
    assert f"`learning_rate` {made.args.learning_rate}," in text
    assert made.facts()["arguments"]["horizontal_flip"] is False  # the manifest has all


def test_the_floor_stands_beside_both_models(tmp_path):
    made, rates = trainer(tmp_path), {"accuracy": 0.91, "accuracy_n": 360}
    source = {"kind": "folder", "name": "twin", "revision": None, "sha256": None}
    made.record(Report(results=results(344, 5, 2, 9), n_images=360, floor={"source": source, "rates": rates}))
    text = made.card().text
    assert "| ACC | 96.9 % [94.6, 98.3] | 96.1 % [93.6, 97.7] | 91.0 % | 360 |" in text
    assert "Floor: what a model without a backdoor does on the same images, folder `twin`." in text
    assert str(made.report).splitlines()[0] == "| | before | after | floor | images |"


def test_a_manifest_names_its_schema_and_what_is_damaged_does_not_pass(tmp_path):
    schema, made = json.loads(SCHEMA_FILE.read_text()), trainer(tmp_path)
    jsonschema.Draft202012Validator.check_schema(schema)
    made.train()
    facts = json.loads(json.dumps(made.facts()))
    assert facts["schema"] == SCHEMA == schema["$id"]
    jsonschema.validate(facts, schema)
    lacking = {name: value for name, value in facts.items() if name != "network"}
    for spoilt in (
        lacking,
        facts | {"schema": "urn:d3_hf:purification:2"},
        facts | {"measured": {"unheard": 1}},
        facts | {"reference_sha256": "0"},
        facts | {"source": {"kind": "place", "name": "x", "revision": None, "sha256": None}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, schema)
