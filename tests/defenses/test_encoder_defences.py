"""Defences of encoders: what a step computes, that labels are not looked at, resuming, what is saved, refusals."""

import json
import shutil

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from places import ROOT
from tiny_encoders import NAMES, colours, tiny_clip, tiny_dinov2, tiny_module, tiny_resnet, tiny_timm, tiny_vit
from transformers import AutoModel

from d3_hf.attacks import BadEncoder
from d3_hf.data.images import RawImages
from d3_hf.data.views import view
from d3_hf.defenses import DEFENCES, ENCODER_DEFENCES, defence
from d3_hf.models.kinds import encode
from d3_hf.training.config import declared
from d3_hf.training.encoders import EncoderTrainer
from d3_hf.workflow import purify_encoder

SCHEMA = ROOT / "d3_hf" / "publishing" / "schemas" / "purification.schema.json"
IMAGES = colours(20)
QUICK = {"per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3, "optim": "adamw_torch"}
STEPS = {"max_steps": 2}
CURVES = {"rounds": 1, "curve_epochs": 1, "per_device_train_batch_size": 10}  # TSC's stages are counted in epochs: four steps
SAVING = {"save_strategy": "steps", "save_steps": 2}
ENCODERS = [tiny_dinov2, tiny_vit, tiny_resnet, tiny_clip, tiny_timm, tiny_module]


def build(name, folder, make=tiny_dinov2, images=IMAGES, **options):
    config_class, trainer_class = defence(name, of_encoders=True)
    length = CURVES if name == "tsc" else STEPS
    return trainer_class(make(), config_class(str(folder), **QUICK | length | options), images)


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def losses_of(run):
    """Each image's loss of the first batch, features of both views, and those of the encoder before."""
    run.batch_number = 0
    rows = list(range(8))
    batch = run.training_batch(run.train_dataset.__getitems__(rows))
    generator = run.generator()
    views = torch.cat([view(run.train_dataset.images[rows], generator) for _ in range(2)])
    assert torch.equal(batch["pixel_values"], run.preprocessing.normalize(views))
    with torch.no_grad():
        features, before = (encode(model.eval(), batch["pixel_values"]) for model in (run.model, run.before))
        return run.image_losses(features)[0], features, before


def moved(run):
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return run


def slow_nt_xent(features):
    z = F.normalize(features, dim=1)
    found = []
    for i in range(16):
        scores = torch.stack([z[i] @ z[j] / 0.5 for j in range(16) if j != i])
        found.append(scores.logsumexp(0) - z[i] @ z[(i + 8) % 16] / 0.5)
    return torch.stack(found).view(2, 8).mean(0)


def distances(features, before):
    return torch.stack([(f / f.norm() - g / g.norm()).square().sum() for f, g in zip(features, before, strict=True)])


@pytest.mark.parametrize("threshold", [2.15, 1e-3])
def test_par_is_nt_xent_less_the_distance_up_to_the_cut_off(threshold, tmp_path):
    losses, features, before = losses_of(moved(build("par", tmp_path, feature_threshold=threshold)))
    mean = distances(features, before).mean()
    assert 1e-3 < mean < 2.15
    expected = slow_nt_xent(features).mean() - (0.5 * mean if threshold > 1 else 0)
    torch.testing.assert_close(losses.mean(), expected)


def test_d3_is_the_hinge_of_the_relations_less_the_distance(tmp_path):
    run = moved(build("encoder_d3", tmp_path, lambda_relations=3.0, epsilon=0.02, feature_threshold=0.1))
    losses, features, before = losses_of(run)
    f, g = F.normalize(features, dim=1), F.normalize(before, dim=1)
    expected = []
    for i, distance in enumerate(distances(features, before)):
        relation = sum((f[i] @ f[j] - g[i] @ g[j]) ** 2 for j in range(16) if j != i) / 15
        expected.append(3 * max(relation - 0.02, torch.tensor(0.0)) - (distance if distance <= 0.1 else 0))
    torch.testing.assert_close(losses, torch.stack(expected).view(2, 8).mean(0), rtol=1e-4, atol=1e-5)


def test_mimic_is_nt_xent_less_the_likeness_to_the_teacher(tmp_path):
    losses, features, before = losses_of(moved(build("mimic", tmp_path, teacher_weight=2.0)))
    alike = torch.stack([F.cosine_similarity(f, g, 0) for f, g in zip(features, before, strict=True)]).view(2, 8).mean(0)
    torch.testing.assert_close(losses, slow_nt_xent(features) - 2 * alike, rtol=1e-4, atol=1e-5)


def test_mimics_student_starts_from_weights_of_its_own(tmp_path):
    run = build("mimic", tmp_path)
    state = torch.get_rng_state()
    run.start()
    assert torch.equal(torch.get_rng_state(), state) and same(run.before, tiny_dinov2())
    matrices = [name for name, p in run.model.named_parameters() if p.ndim > 1 and p.std() > 0]
    old = tiny_dinov2().state_dict()
    assert len(matrices) > 5 and not any(torch.equal(run.model.state_dict()[name], old[name]) for name in matrices)
    with pytest.raises(ValueError, match="mimic makes a student from the configuration, .* wrapped module: take par"):
        build("mimic", tmp_path, tiny_module)


def test_d3_moves_away_while_relations_stay_near(tmp_path):
    run = build("encoder_d3", tmp_path, max_steps=40, lr_scheduler_type="constant")
    run.train()
    last = [log for log in run.state.log_history if "feature_distance" in log][-1]
    assert last["feature_distance"] > 0.05 and last["relation_loss"] < 0.1


# Every defence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODER_DEFENCES)
def test_labels_are_not_looked_at(name, tmp_path):
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=NAMES)})
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES.images]
    labelled = Dataset.from_dict({"image": pictures, "label": IMAGES.labels.tolist()}, features=features)
    others = RawImages(IMAGES.images, IMAGES.labels.flip(0) * 0, ["one class"])
    forms = (IMAGES, labelled, labelled.remove_columns("label"), others)
    runs = [build(name, tmp_path / str(number), images=images) for number, images in enumerate(forms)]
    for run in runs:
        run.train()
        assert not run.train_dataset.labels.any()
    assert all(same(run.model, runs[0].model) for run in runs[1:]) and not same(runs[0].model, tiny_dinov2())


@pytest.mark.parametrize("make", ENCODERS)
@pytest.mark.parametrize("name", ["par", "encoder_d3"])
def test_every_kind_of_encoder_trains(name, make, tmp_path):
    run = build(name, tmp_path, make)
    run.train()
    assert not same(run.model, make()) and all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("name", ENCODER_DEFENCES)
def test_a_resumed_run_ends_as_the_uninterrupted_one_and_what_is_saved_reloads(name, tmp_path):
    saving = SAVING | ({} if name == "tsc" else {"max_steps": 4})
    whole = build(name, tmp_path / "run", **saving)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = build(name, tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.model, whole.model)
    other = build(name, tmp_path / "run", lambda: tiny_dinov2(1), **saving)
    with pytest.raises(ValueError, match="belongs to a run from another model"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    resumed.save_model()
    assert same(AutoModel.from_pretrained(tmp_path / "run"), whole.model)
    facts, card = json.loads((tmp_path / "run" / "purification.json").read_text()), (tmp_path / "run" / "README.md").read_text()
    jsonschema.validate(facts, json.loads(SCHEMA.read_text()))
    assert facts["kind"] == "encoder" and facts["method"] in card and facts["retain"]["n"] == 20
    assert "pipeline_tag: image-feature-extraction" in card and "RA and PACC" not in card and "guard rail" not in card
    assert "image encoder was **purified**" in card and "AutoModel.from_pretrained" in card and "classify" not in card


@pytest.mark.parametrize(("name", "weight"), [("par", "feature_weight"), ("mimic", "teacher_weight")])
def test_accumulated_micro_batches_are_counted_by_their_images(name, weight, tmp_path):
    """The objective of an update over two micro-batches, of 8 and of 4 images, is the mean over all twelve."""
    run = build(name, tmp_path, images=colours(12), gradient_accumulation_steps=2, logging_steps=1, max_steps=1)
    run.train()
    (log,) = [log for log in run.state.log_history if run.log_names[0] in log]
    first, second = (log[term] for term in run.log_names)
    assert log["objective"] == pytest.approx(first - getattr(run.args, weight) * second, abs=2e-3)


def test_before_and_after_are_measured_by_probes_and_stand_in_the_card(tmp_path):
    run = build("par", tmp_path / "out", tiny_resnet)
    attack = BadEncoder(size=4, image_size=16)
    run.describe(license="mit", tasks="image-feature-extraction")
    with pytest.raises(ValueError, match="tasks=image-classification: the model is for image-feature-extraction"):
        run.describe(tasks="image-classification")
    report = purify_encoder(run, colours(30, seed=1), colours(30, seed=2), attack)
    assert set(report.results) == {"before", "after"} and set(report.results["after"]) == {"linear", "knn"}
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == report.results
    card = (tmp_path / "out" / "README.md").read_text()
    assert "before, linear probe" in card and "after, kNN" in card and "on 30 labelled images" in card
    assert "Known trigger (badencoder): by linear probe ASR" in card and "model-index" not in card and "![" not in card
    facts = json.loads((tmp_path / "out" / "purification.json").read_text())
    jsonschema.validate(facts, json.loads(SCHEMA.read_text()))
    assert facts["measured"]["trigger"]["name"] == "badencoder" and facts["measured"]["probe"] == {"images": 30, "seeds": 3}


# Refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_of_classifiers_says_that_an_encoder_has_no_head(name, tmp_path):
    config_class, trainer_class = defence(name)
    options = {"base_model": str(tmp_path)} if name == "base_tuning" else {}
    with pytest.raises(ValueError, match="Dinov2Model is an encoder without a head") as caught:
        trainer_class(tiny_dinov2(), config_class(str(tmp_path / "out"), use_cpu=True, **options), IMAGES)
    assert "\n" not in str(caught.value)


def test_what_an_encoder_has_no_use_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="horizontal_flip is for classifiers"):
        build("par", tmp_path, horizontal_flip=True)
    with pytest.raises(ValueError, match="leave eval_dataset out"):
        config_class, trainer_class = defence("par")
        trainer_class(tiny_resnet(), config_class(str(tmp_path), **QUICK), IMAGES, IMAGES)
    with pytest.raises(ValueError, match="pass RawImages or a datasets.Dataset with a column `image`, not a list"):
        build("par", tmp_path, images=[1, 2])
    with pytest.raises(ValueError, match="PARTrainer does not take distillation"):
        build("par", tmp_path, distillation=1.0)
    with pytest.raises(NotImplementedError):
        EncoderTrainer.image_losses(build("par", tmp_path), None)


@pytest.mark.parametrize("name", ENCODER_DEFENCES)
@pytest.mark.parametrize("few", [{"images": colours(1)}, {"per_device_train_batch_size": 1}])
def test_one_image_has_nothing_to_be_told_apart_from(name, few, tmp_path):
    with pytest.raises(ValueError, match="^images of a batch are told apart, and there is one in each: give more images"):
        build(name, tmp_path, **few)


@pytest.mark.parametrize("name", ENCODER_DEFENCES)
def test_a_number_out_of_its_range_is_refused_by_name(name, tmp_path):
    config_class, _ = defence(name, of_encoders=True)
    own = {f: needed for f, needed in declared(config_class, "range").items() if f in config_class.__annotations__}
    assert len(own) >= 2
    for option in own:
        with pytest.raises(ValueError, match=f"^{option} must be "):
            config_class(str(tmp_path), **{option: -1.0})
