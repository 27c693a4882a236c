"""The schedule's rule: which row fits which real network, what is settled, what a user's option does to it."""

import pytest
import timm
from tiny import tiny_resnet, tiny_samples, tiny_vit
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from d3_hf.defenses import defence
from d3_hf.publishing.execution import plain
from d3_hf.training.schedule import RULES, passes, resolved, rule_of

VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
TRANSFORMERS = {
    "vit": (VIT, "LayerNorm"),
    "deit": (VIT | {"architectures": ["DeiTForImageClassification"]}, "LayerNorm"),
    "beit": (VIT, "LayerNorm"),
    "dinov2": (VIT, "LayerNorm"),
    "swin": (SWIN, "LayerNorm"),
    "convnext": (STAGES, "LayerNorm"),
    "convnextv2": (STAGES, "LayerNorm"),
    "bit": ({"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4}, "LayerNorm"),
    "resnet": (STAGES, "BatchNorm"),
    "efficientnet": ({"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}, "BatchNorm"),
    "mobilenet_v2": ({"depth_multiplier": 0.25}, "BatchNorm"),
}
TIMM = {
    "vit_tiny_patch16_224": "LayerNorm",
    "test_vit": "LayerNorm",
    "test_convnext": "LayerNorm",
    "swin_tiny_patch4_window7_224": "LayerNorm",
    "mobilevit_xxs": "LayerNorm",
    "test_resnet": "BatchNorm",
    "test_efficientnet": "BatchNorm",
    "resnet20_cifar": "BatchNorm",
    "levit_128s": "BatchNorm",
    "vgg11": "no normalisation",
}
TINY = 0.0048  # the learning rate of a ViT of eight channels
QUIET = {"disable_tqdm": True, "use_cpu": True}
SCHEDULE = ("optim", "optim_args", "learning_rate", "warmup_steps", "per_device_train_batch_size", "num_train_epochs")


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_rule_of_transformers_networks(kind):
    options, name = TRANSFORMERS[kind]
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, num_labels=3, **options))
    assert rule_of(model).name == name


@pytest.mark.parametrize("kind", TIMM)
def test_the_rule_of_timm_networks(kind):
    options = {"mlp_ratio": 0.01} if kind == "vgg11" else {}
    assert rule_of(timm.create_model(kind, num_classes=3, **options)).name == TIMM[kind]


def test_every_network_has_a_rule():
    assert rule_of(nn.Linear(2, 2)) is RULES[-1]


def settled(model, count=1000, name="fine_tuning", **options):
    config, _ = defence(name)
    args, facts = resolved(config("outputs/schedule", **QUIET | options), model, count)
    return {option: plain(getattr(args, option)) for option in SCHEDULE}, facts


def test_what_is_settled_is_the_row():
    rule, (found, facts) = RULES[0], settled(tiny_vit())
    updates = found["num_train_epochs"] * -(-1000 // rule.images)
    assert abs(updates - rule.updates) <= rule.updates / 10
    assert found | {"num_train_epochs": None} == {
        "optim": rule.optim,
        "optim_args": None,
        "learning_rate": TINY,
        "warmup_steps": int(rule.warmup * updates),
        "per_device_train_batch_size": rule.images,
        "num_train_epochs": None,
    }
    assert facts["rule"] == "LayerNorm" and facts["options"] == {n: v for n, v in found.items() if v is not None}


@pytest.mark.parametrize(("width", "rate"), [(64, 6e-4), (192, 2e-4), (384, 1e-4), (768, 5e-5)])
def test_wider_transformers_take_smaller_steps(width, rate):
    config = AutoConfig.for_model("vit", num_labels=3, **VIT | {"hidden_size": width})
    found, _ = settled(AutoModelForImageClassification.from_config(config))
    assert found["learning_rate"] == pytest.approx(rate)


def test_convolutions_keep_the_schedule_that_was_measured_on_them():
    found, _ = settled(tiny_resnet(), 2500)
    expected = ("sgd", "momentum=0.9", 0.1, 0, 128, 15)
    assert found == dict(zip(SCHEDULE, expected, strict=True))


def test_few_images_get_as_many_updates_as_many_do():
    assert [passes(300, count, 128) * -(-count // 128) for count in (100, 300, 1000, 2500)] == [300, 300, 304, 300]
    assert passes(300, 50_000, 128) == 1


def test_given_options_win():
    given = {"learning_rate": 3e-4, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    found, facts = settled(tiny_vit(), **given)
    assert found.items() >= given.items() and found["optim"] == "adamw_torch"
    assert not facts["options"].keys() & given.keys()
    found, facts = settled(tiny_vit(), max_steps=50)
    assert found["num_train_epochs"] == passes(50, 1000, RULES[0].images)
    everything = given | {"optim": "adamw_torch", "optim_args": "eps=1e-6", "warmup_steps": 0}
    assert settled(tiny_vit(), **everything) == (everything, {})


def test_another_optimizer_needs_its_own_learning_rate():
    with pytest.raises(ValueError, match="learning rate for adamw_torch: give learning_rate too with optim=sgd"):
        settled(tiny_vit(), optim="sgd")
    with pytest.raises(ValueError, match="optim_args='momentum=0.8' is for one optimizer"):
        settled(tiny_vit(), optim_args="momentum=0.8")
    assert settled(tiny_vit(), optim="sgd", learning_rate=0.01)[0]["optim_args"] == "momentum=0.9"
    assert settled(tiny_resnet(), optim="adamw_torch", learning_rate=1e-4)[0]["optim_args"] is None
    assert settled(tiny_vit(), optim="adamw_torch")[0]["learning_rate"] == TINY


def test_a_run_from_near_the_base_has_further_to_go():
    for name, options in (("d3", {}), ("base_tuning", {"keep": 0.5})):
        found, _ = settled(tiny_vit(), name=name, base_model="base", **options)
        assert found["learning_rate"] == pytest.approx(TINY * RULES[0].learning_rate_from_base / RULES[0].learning_rate)
        assert found["num_train_epochs"] == passes(RULES[0].updates_from_base, 1000, RULES[0].images)
    assert settled(tiny_vit(), name="d3")[0]["num_train_epochs"] == passes(RULES[0].updates, 1000, RULES[0].images)
    assert (
        settled(tiny_vit(), name="d3")[0]["learning_rate"]
        == settled(tiny_vit(), name="d3", count=250)[0]["learning_rate"]
        == TINY
    )
    counts = (None, 5000, 1000, 250, 40)
    rates = [settled(tiny_vit(), name="d3", base_model="base", count=count)[0]["learning_rate"] for count in counts]
    assert rates == pytest.approx([rates[0]] * 3 + [rates[0] / 2, rates[0] / 5], rel=0.05)  # two digits
    assert RULES[0].updates_from_base > RULES[0].updates and RULES[0].learning_rate_from_base < RULES[0].learning_rate
    many, few = (settled(tiny_vit(), name="d3", base_model="base", count=count)[0]["num_train_epochs"] for count in (5000, 100))
    assert many == RULES[0].passes_from_base and few == passes(RULES[0].updates_from_base, 100, RULES[0].images)
    assert settled(tiny_vit(), name="d3", base_model="base", count=5000, max_steps=50)[0]["num_train_epochs"] == 1


def test_processes_and_micro_batches_share_an_update():
    found, _ = settled(tiny_vit(), gradient_accumulation_steps=4)
    assert found["per_device_train_batch_size"] == RULES[0].images // 4
    assert found["num_train_epochs"] == settled(tiny_vit())[0]["num_train_epochs"]


def test_a_publication_has_its_say_where_it_was_measured():
    d3, fst = (settled(tiny_vit(), name=name)[0] for name in ("d3", "fst"))
    assert d3 == fst
    found, _ = settled(tiny_resnet(), name="fst")
    assert (found["learning_rate"], found["num_train_epochs"], found["per_device_train_batch_size"]) == (0.01, 10, 128)
    assert settled(tiny_vit(), name="tsbd")[0]["learning_rate"] == TINY


def test_the_run_says_it_and_the_configuration_stays(tmp_path, capsys):
    config, trainer = defence("fine_tuning")
    args = config(str(tmp_path), **QUIET, max_steps=2)
    made = trainer(tiny_vit(), args, tiny_samples(8))
    assert args.learning_rate is args.optim is None and made.args.learning_rate == TINY
    made.train()
    assert "schedule for a network with LayerNorm: optim adamw_torch, learning_rate 0.0048" in capsys.readouterr().out
    said = "Settled by the rule for networks with LayerNorm, since they were not given: `optim` adamw_torch,"
    assert said in str(made.card())
    assert made.facts()["schedule"] == made.schedule and made.facts()["arguments"]["optim"] == "adamw_torch"
