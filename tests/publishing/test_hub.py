"""What goes up and what does not, pushes that fail, repositories that lie: against a Hub on the loopback interface."""

import base64
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fake_hub import Repository
from hub_session import FAST, MODEL_FILES, TOKEN, suspicious_model
from safetensors.torch import load_file
from tiny import tiny_samples, tiny_vit
from transformers import ViTForImageClassification

from d3_hf import D3Config, D3Trainer, load_classifier
from d3_hf.commands.push import run as push_command
from d3_hf.files import sha256
from d3_hf.publishing import hub as pushing
from d3_hf.publishing.signature import signed_files


def contents(folder):
    return {file.name: sha256(file) for file in folder.rglob("*") if file.is_file()}


def test_only_what_is_listed_goes_up(own_hub, purified):
    pushing.push_folder(purified, "model")
    files = own_hub.repos["me/model"].commits[-1][1]
    assert set(files) == MODEL_FILES and own_hub.repos["me/model"].private
    assert b'model="me/model"' in files["README.md"]


def test_a_card_is_named_after_the_repository_it_goes_to(own_hub, purified):
    assert "# run\n" in (purified / "README.md").read_text()
    pushing.push_folder(purified, "me/other-name")
    readme = own_hub.repos["me/other-name"].commits[-1][1]["README.md"].decode()
    assert "# other-name\n" in readme and "# run\n" not in readme and "path/to/this/folder" not in readme


def signed(folder, *names):
    """A folder with a signature that covers files of these names, as far as a push reads it."""
    statement = {"predicate": {"resources": [{"name": name, "algorithm": "sha256", "digest": "0" * 64} for name in names]}}
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    (folder / "model.sig").write_text(json.dumps({"dsseEnvelope": {"payload": payload}}))
    return folder


def test_a_card_that_is_signed_goes_up_as_it_is_or_not_at_all(own_hub, purified, tmp_path):
    folder = signed(Path(shutil.copytree(purified, tmp_path / "run")), "README.md", "model.safetensors")
    with pytest.raises(
        ValueError, match=r"covers README.md of .*, which does not name me/model: purify with --hub_model_id me/m"
    ):
        pushing.push_folder(folder, "me/model")
    assert not own_hub.seen
    card = (folder / "README.md").read_text().replace("path/to/this/folder", "me/model")
    (folder / "README.md").write_text(card)
    pushing.push_folder(folder, "me/model")
    assert own_hub.repos["me/model"].commits[-1][1]["README.md"] == card.encode()
    own_hub.repos["me/model"].commit({"README.md": b"# Mine"})
    with pytest.raises(
        ValueError, match="which would be changed by what me/model holds: push to a new repository, or sign with"
    ):
        pushing.push_folder(folder, "me/model")
    pushing.push_folder(signed(folder, "model.safetensors"), "me/model")
    assert b"# Mine" in own_hub.repos["me/model"].commits[-1][1]["README.md"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"dsseEnvelope": {"payload": "?"}}', '{"dsseEnvelope": null}'])
def test_a_signature_of_another_kind_covers_nothing_that_is_known(tmp_path, text):
    (tmp_path / "model.sig").write_text(text)
    assert signed_files(tmp_path / "model.sig") == set() == signed_files(tmp_path / "absent.sig")


def test_of_pictures_only_those_that_the_card_shows_go_up(own_hub, purified, tmp_path):
    folder = Path(shutil.copytree(purified, tmp_path / "run"))
    (folder / "weights.png").write_bytes(b"drawn")
    with (folder / "README.md").open("a") as card:
        card.write(
            "![path](./path.png)![](weights.png 'What moved')![](https://here.org/x.png)![](data:image/png;base64,iVBOR)"
        )
    pushing.push_folder(folder, "model")
    assert set(own_hub.repos["me/model"].commits[-1][1]) == MODEL_FILES | {"path.png", "weights.png"}


@pytest.mark.parametrize("name", ["absent.png", "notes.txt", "../run/path.png", "/etc/hostname", "figures/path.png"])
def test_a_card_that_shows_what_does_not_go_up_is_refused(purified, tmp_path, name):
    folder = Path(shutil.copytree(purified, tmp_path / "run"))
    with (folder / "README.md").open("a") as card:
        card.write(f"![a picture]({name})")
    with pytest.raises(ValueError, match=f"README.md shows {name}, which is no .png beside it: put one there, or show"):
        pushing.published_files(folder)


REQUESTS = ("create", "info", "validate", "preupload", "commit")


def test_these_are_all_the_requests_of_a_push(own_hub, purified):
    pushing.push_folder(purified, "me/model")
    assert set(own_hub.seen) == set(REQUESTS)


@pytest.mark.parametrize("how", ["500", "429", "reset", "slow"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_failed_push_costs_nothing_and_is_finished_by_another(own_hub, purified, request_name, how):
    before = contents(purified)
    own_hub.broken = (request_name, how)
    with pytest.raises(OSError) as failed:
        pushing.push_folder(purified, "me/model", private=False)
    assert re.fullmatch(
        rf"the push to me/model failed \(.+\); {purified} is whole. Finish it with: "
        rf"d3-hf push {purified} --hub_model_id me/model --hub_private_repo false",
        str(failed.value),
    )
    assert TOKEN not in str(failed.value) and contents(purified) == before
    own_hub.broken = None
    pushing.push_folder(purified, "me/model", private=False)
    assert set(own_hub.repos["me/model"].commits[-1][1]) == MODEL_FILES


def test_the_trainer_saves_before_it_pushes(own_hub, tmp_path):
    own_hub.broken = ("create", "500")
    args = D3Config(str(tmp_path / "run"), push_to_hub=True, hub_model_id="me/model", **FAST)
    trainer = D3Trainer(tiny_vit(), args, tiny_samples())
    trainer.train()
    with pytest.raises(OSError, match="is whole. Finish it with: d3-hf push"):
        trainer.push_to_hub()
    assert {file.name for file in (tmp_path / "run").iterdir()} == MODEL_FILES
    load_classifier(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda folder: (folder / "purification.json").unlink(), {}, FileNotFoundError, "no folder of a purified model"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, FileNotFoundError, "the weights are not whole"),
        (lambda folder: (folder / "model.sig").symlink_to("/etc/hostname"), {}, ValueError, "model.sig is a link out of the"),
        *(
            (lambda folder, text=text: (folder / "purification.json").write_text(text), {}, ValueError, message)
            for text, message in (
                ("{", r"purification.json is no manifest of a purification \(no JSON: .*\): purify again"),
                ("[" * 100_000, r"no manifest of a purification \(no JSON: .*\): purify again"),
                ("[]", r"no manifest of a purification \(it is no mapping\)"),
                ('{"measured": {}, "source": "me/model"}', r"\(source is no mapping\)"),
                ('{"source": {"kind": "hub", "name": "me/x"}}', r"\(no source.revision\)"),
                ('{"source": {"kind": "hub", "name": "me/x", "revision": null}}', r"\(no measured\)"),
                ('{"source": {"kind": "hub", "name": "me/x", "revision": null}, "measured": []}', "measured is no mapping"),
            )
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            {},
            ValueError,
            r"index.json is no index of shards \(no weight_map\)",
        ),
        (lambda folder: None, {"repo": None}, ValueError, "name one place to push to"),
        (lambda folder: None, {"create_pr": True}, ValueError, "name one place to push to"),
        (lambda folder: None, {"repo": None, "create_pr": True}, ValueError, "but ViTForImageClassification is none"),
    ],
)
def test_what_is_not_pushed(purified, tmp_path, change, options, error, message):
    folder = Path(shutil.copytree(purified, tmp_path / "run"))
    change(folder)
    with pytest.raises(error, match=message):
        pushing.push_folder(folder, **({"repo": "me/model"} | options))


def test_a_rejected_model_is_not_pushed(purified, tmp_path):
    folder = Path(shutil.copytree(purified, tmp_path / "run"))
    facts = json.loads((folder / "purification.json").read_text())
    (folder / "purification.json").write_text(json.dumps(facts | {"measured": {"rejected": ["ACC fell"]}}))
    with pytest.raises(ValueError, match=r"was rejected and is not pushed \(ACC fell\)"):
        pushing.push_folder(folder, "me/model")


def test_a_folders_name_alone_rejects_nothing(own_hub, purified, tmp_path):
    folder = shutil.copytree(purified, tmp_path / "rejected" / "run")
    assert push_command([str(folder), "--hub_model_id", "me/model"])["commit"] == own_hub.repos["me/model"].commits[-1][0]


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ({"hub_model_id": "me/model"}, None, "log in with `hf auth login` or set HF_TOKEN"),
        ({"hub_create_pr": True}, TOKEN, "opens a pull request on the source's repository, but"),
    ],
)
def test_what_would_stop_the_push_is_said_at_the_start(tmp_path, monkeypatch, options, token, message):
    monkeypatch.setattr(pushing, "get_token", lambda: token)
    with pytest.raises(ValueError, match=message):
        D3Trainer(tiny_vit(), D3Config(str(tmp_path), push_to_hub=True, **options, **FAST), tiny_samples())


@pytest.mark.parametrize("options", [{}, {"push_to_hub": True, "hub_model_id": "me/model"}])
def test_a_pull_request_needs_a_push_and_no_repository(options):
    with pytest.raises(ValueError, match="give --push_to_hub and leave hub_model_id out"):
        D3Config("x", hub_create_pr=True, **options, **FAST)


def test_without_the_hub_its_checks_are_not_available():
    source = {"kind": "hub", "name": "them/suspicious", "revision": "a" * 40, "sha256": None}
    assert pushing.source_checks(source) == {"security_scan": "not available", "checksums": "not available"}
    assert pushing.source_checks(source | {"kind": "folder"}) is None


def test_files_that_changed_since_they_were_fetched_are_named(own_hub, tmp_path, caplog):
    publish(own_hub, repository(tmp_path))
    source = asdict(load_classifier("them/hostile").source)
    assert pushing.source_checks(source)["checksums"] == {"compared": 3, "differ": []}
    next((tmp_path / "cache").rglob("snapshots/*/config.json")).resolve().write_text("{}")
    assert pushing.source_checks(source)["checksums"] == {"compared": 3, "differ": ["config.json"]}
    assert "them/hostile: not as in the repository: config.json" in caplog.text


# Hostile repositories --------------------------------------------------------------------------------------------------------


def repository(tmp_path):
    """The files of a repository with a good model."""
    model = suspicious_model()
    model.save_pretrained(tmp_path / "model"), model.image_processor.save_pretrained(tmp_path / "model")
    return {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}


def publish(hub, files):
    hub.repos["them/hostile"] = repo = Repository(private=False, commits=[])
    return repo.commit(files)


def test_a_pickle_is_not_even_fetched(own_hub, tmp_path):
    files = repository(tmp_path)
    publish(own_hub, {name.replace("model.safetensors", "pytorch_model.bin"): data for name, data in files.items()})
    with pytest.raises(FileNotFoundError, match="them/hostile holds no model.safetensors"):
        load_classifier("them/hostile")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_remote_code_is_refused_and_never_fetched(own_hub, tmp_path):
    files = repository(tmp_path)
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModelForImageClassification": "modeling.Net"}}
    for number, changed in enumerate((config, config | {"model_type": "my_net"})):
        publish(own_hub, files | {"config.json": json.dumps(changed).encode(), "modeling.py": b"raise SystemExit"})
        if number:
            with pytest.raises(ValueError, match="needs Python code of its repository"):
                load_classifier("them/hostile")
        else:  # a network that transformers has is built from its own code
            assert isinstance(load_classifier("them/hostile"), ViTForImageClassification)
    assert not list((tmp_path / "cache").rglob("*.py"))


@pytest.mark.parametrize("name", ["model-/../../../../../out-of-.safetensors", "../model-1-of-1.safetensors"])
def test_a_name_that_leaves_the_folder_is_refused_or_never_asked_for(own_hub, tmp_path, name):
    publish(own_hub, repository(tmp_path) | {name: b"evil"})
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    if name.startswith("model-"):
        with pytest.raises(OSError, match="them/hostile at revision main: Invalid filename .* cannot contain a '..'"):
            load_classifier("them/hostile")
    else:  # no name that is asked for
        load_classifier("them/hostile")
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_all_files_are_of_the_commit_that_was_read_first(own_hub, tmp_path):
    files = repository(tmp_path)
    first = publish(own_hub, files)
    other = suspicious_model()
    other.save_pretrained(tmp_path / "other")

    def change(request):
        if request == "info" and len(own_hub.repos["them/hostile"].commits) == 1:
            own_hub.repos["them/hostile"].commit({f.name: f.read_bytes() for f in (tmp_path / "other").iterdir()})

    own_hub.before_sending = change
    model = load_classifier("them/hostile")
    assert model.source.revision == first and len(own_hub.repos["them/hostile"].commits) == 2
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])
