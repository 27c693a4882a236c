"""`push_to_hub` and `create_model_card` take what `Trainer`'s take, with effect on the card and on the request."""

import inspect
from concurrent.futures import Future

import pytest
from huggingface_hub import CommitInfo, ModelCard
from tiny import FAST, tiny_samples, tiny_vit
from transformers import Trainer, TrainerCallback

from d3_hf import D3Config, D3Trainer
from d3_hf.evaluation.metrics import Proportion
from d3_hf.models.source import Source
from d3_hf.publishing import hub
from d3_hf.publishing.details import CardDetails
from d3_hf.publishing.report import Report


def trainer(folder, source=None, **options):
    model = tiny_vit()
    model.source = source
    return D3Trainer(model, D3Config(str(folder / "run"), **FAST, **options), tiny_samples())


def card_in(folder):
    return ModelCard.load(folder / "run" / "README.md").data


@pytest.mark.parametrize(
    "method", ["push_to_hub", "create_model_card", "init_hf_repo", "save_model", "evaluate", "predict", "train"]
)
def test_signatures_are_those_of_trainer(method):
    theirs, ours = (inspect.signature(getattr(kind, method)).parameters for kind in (Trainer, D3Trainer))
    assert list(ours) == list(theirs)


def test_a_card_carries_what_it_is_told_and_keeps_it(tmp_path):
    made = trainer(tmp_path)
    made.model.add_model_tags("of-the-model")
    given = dict(language=["en", "de"], license="apache-2.0", finetuned_from="them/model", tasks="image-classification")
    made.create_model_card(**given, tags="mine", dataset=["me/photos"], model_name="A name")
    found = card_in(tmp_path)
    assert (found.language, found.license, found.datasets) == (["en", "de"], "apache-2.0", ["me/photos"])
    assert (found.base_model, found.base_model_relation, found.pipeline_tag) == (
        "them/model",
        "finetune",
        "image-classification",
    )
    assert {"purified", "d3_hf", "mine", "of-the-model"} <= set(found.tags)
    assert "# A name\n" in (tmp_path / "run" / "README.md").read_text()
    made.create_model_card(tags=["more"], dataset_tags="me/others")
    made.save_model()
    later = card_in(tmp_path)
    assert {"mine", "more", "of-the-model"} <= set(later.tags)
    assert (later.license, later.datasets) == ("apache-2.0", ["me/others"])


HALF = Proportion(5, 10).as_dict("accuracy_before") | Proportion(5, 10).as_dict("accuracy_after")


def test_what_was_measured_is_described_and_never_changed(tmp_path):
    made = trainer(tmp_path)
    made.record(Report(data="them/data", split="test", n_images=9, results=HALF))
    made.create_model_card(dataset="me/photos", dataset_args="size: 32")
    (result,) = card_in(tmp_path).eval_results
    assert (result.dataset_type, result.dataset_args, result.metric_value) == ("them/data", "size: 32", 0.5)


HUB = Source("hub", "them/model", "a" * 40)


@pytest.mark.parametrize(
    ("given", "source", "error", "message"),
    [
        ({"tasks": ["image-classification", "fill-mask"]}, None, ValueError, "tasks=fill-mask: the model is for image-class"),
        ({"finetuned_from": "them/other"}, HUB, ValueError, "the model that was purified is them/model"),
        ({"dataset_args": "split: test"}, None, ValueError, "nothing was measured: use purify"),
    ],
)
def test_what_contradicts_the_run_is_refused(tmp_path, given, source, error, message):
    made = trainer(tmp_path, source)
    for call in (made.create_model_card, made.push_to_hub):
        with pytest.raises(error, match=message):
            call(**given)
    assert made.card_details == CardDetails() and not (tmp_path / "run").exists()


def test_an_unknown_detail_is_named(tmp_path):
    with pytest.raises(TypeError, match="a card has no licence: it takes language, license, tags"):
        trainer(tmp_path).push_to_hub(licence="mit")


class Heard(TrainerCallback):
    pushes = 0

    def on_push_begin(self, args, state, control, **kwargs):
        self.pushes += 1


@pytest.fixture
def asked(monkeypatch):
    """What `hub.push_folder` was asked for, in place of asking the Hub."""
    calls = []
    commit = CommitInfo("https://huggingface.co/me/run/commit/1", "", "", "1")
    monkeypatch.setattr(hub, "push_folder", lambda folder, repo, **options: calls.append((folder, repo, options)) or commit)
    return calls


def test_a_push_takes_trainers_arguments(tmp_path, asked):
    made, heard = trainer(tmp_path), Heard()
    made.add_callback(heard)
    commit = made.push_to_hub("A message", token="hf_mine", revision="branch", private=False, tags="mine", license="mit")
    assert commit.oid == "1" and heard.pushes == 1
    ((folder, repo, options),) = asked
    assert (folder, repo) == (str(tmp_path / "run"), "run")
    wanted = dict(message="A message", token="hf_mine", revision="branch", private=False, create_pr=False)
    assert options == wanted and card_in(tmp_path).license == "mit" and "mine" in card_in(tmp_path).tags


def test_a_push_that_does_not_block(tmp_path, asked):
    pushing = trainer(tmp_path, hub_revision="main-2").push_to_hub(blocking=False, token="hf_mine")
    assert isinstance(pushing, Future) and pushing.result(timeout=10).oid == "1"
    ((_, _, options),) = asked
    assert options["revision"] == "main-2" and options["private"] and options["message"] == "Purified model"


def test_private_has_no_place_in_a_pull_request(tmp_path, asked, monkeypatch):
    made = trainer(tmp_path, HUB)
    made.args.hub_create_pr = True
    with pytest.raises(ValueError, match="hub_create_pr pushes to the source's: leave private out"):
        made.push_to_hub(private=True, token="hf_mine")
    assert not asked


def test_a_push_without_an_account_is_refused(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="log in with `hf auth login` or set HF_TOKEN"):
        trainer(tmp_path).push_to_hub()
    assert not asked
