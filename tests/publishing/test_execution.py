"""The record is what ran: what launchers, files, checkpoints and handed-over optimizers change is in manifest and card."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from tiny import tiny_samples, tiny_vit

from d3_hf.defenses.d3.trainer import D3Config
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.defenses.ft_sam import FTSAMConfig
from d3_hf.publishing.execution import plain
from d3_hf.publishing.manifest import arguments_of
from d3_hf.victims.record import differences
from d3_hf.victims.train import VictimConfig

QUIET = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 4}
OPTIONS = {
    "lr_scheduler_kwargs": {"num_cycles": 0.25},
    "optim": "sgd",
    "optim_args": "momentum=0.5,nesterov=True",
    "learning_rate": 0.1,
    "accelerator_config": {"split_batches": True},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "dataloader_drop_last": True,
    "weight_decay": 0.25,
}


def trained(folder, resume=None, **given):
    run = FineTuningTrainer(tiny_vit(), FineTuningConfig(str(folder), **(QUIET | given)), tiny_samples())
    run.train(resume)
    return run


def test_all_options_that_are_not_default_are_recorded_as_they_ran(tmp_path):
    run = trained(tmp_path / "run", activation_checkpointing=True, **OPTIONS)
    run.save_model()
    facts = json.loads((tmp_path / "run" / "purification.json").read_text())
    assert OPTIONS.items() <= facts["arguments"].items()
    ran = facts["execution"]
    assert ran["activation_checkpointing"] is True and ran["processes"] == 1 and ran["device"] == "cpu"
    assert ran["mixed_precision"] == "no" and ran["weights"] == ["float32"] and ran["compiled"] == "no"
    assert (ran["images_per_step"], ran["gradient_accumulation_steps"]) == (4, 1)
    decayed, others = ran["optimizer"]["groups"]  # biases and norms are not
    assert ran["optimizer"]["class"] == "SGD" and (decayed["momentum"], decayed["nesterov"]) == (0.5, True)
    assert decayed["lr"] == run.args.learning_rate and (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    card = (tmp_path / "run" / "README.md").read_text()
    assert '| mixed precision | `"no"` |' in card and "`{'num_cycles': 0.25}`" in card
    again = FineTuningConfig(str(tmp_path / "again"), **facts["arguments"])
    assert arguments_of(again) == arguments_of(run.args)


def test_what_is_at_its_default_is_left_out(tmp_path):
    found = arguments_of(FineTuningConfig(str(tmp_path), accelerator_config={"even_batches": True}, use_cpu=True))
    assert not found.keys() & {*OPTIONS, "bf16", "fsdp_config", "parallelism_config"} - {"optim", "optim_args", "learning_rate"}


def test_a_precision_of_the_launcher_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    facts = trained(tmp_path).facts()
    assert facts["execution"]["mixed_precision"] == "bf16" and facts["arguments"]["bf16"] is True


@pytest.mark.parametrize(
    ("options", "given"),
    [(D3Config, {"sam_rho": 1.0}), (FTSAMConfig, {}), (VictimConfig, {"random_heads": 2}), (VictimConfig, {"sam_rho": 1.0})],
)
@pytest.mark.parametrize("what", ["precision", "accumulation"])
def test_what_an_option_would_refuse_is_refused_of_the_launcher_and_of_accelerate(options, given, what, monkeypatch):
    if what == "precision":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    else:
        given = given | {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        options("x", use_cpu=True, **given)


def test_accumulation_by_accelerates_own_option_is_recorded_once(tmp_path):
    given = {"gradient_accumulation_kwargs": {"num_steps": 2}}
    facts = trained(tmp_path, accelerator_config=given).facts()
    assert facts["execution"]["images_per_step"] == 8 and facts["arguments"]["gradient_accumulation_steps"] == 2
    assert "accelerator_config" not in facts["arguments"] and given == {"gradient_accumulation_kwargs": {"num_steps": 2}}


def test_an_optimizer_that_is_handed_over_is_recorded(tmp_path):
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, betas=(0.8, 0.9))
    args = FineTuningConfig(str(tmp_path), **QUIET)
    run = FineTuningTrainer(model, args, tiny_samples(), optimizers=(optimizer, None))
    assert "optimizer" in run.facts()["execution"]
    run.train()
    found = run.facts()["execution"]["optimizer"]
    assert found["class"] == "AdamW" and found["groups"][0]["lr"] == 0.003 and found["groups"][0]["betas"] == [0.8, 0.9]


def test_a_run_resumed_with_other_options_says_what_was_different(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(tmp_path / "run", weight_decay=0.25, **saving)
    again = {"resume": str(tmp_path / "run" / "checkpoint-2")} | saving
    run = trained(tmp_path / "run", weight_decay=0.25, **again)
    assert "resumed" not in run.facts() and "was trained with other" not in caplog.text
    run = trained(tmp_path / "run", learning_rate=0.02, **again)
    assert "checkpoint-2 was trained with other learning_rate, weight_decay: optimizer" in caplog.text
    first = {"until_step": 2, "arguments": {"learning_rate": 0.0048, "weight_decay": 0.25}}  # by rule
    facts = run.facts()
    assert facts["resumed"] == [first] and "Up to step 2 it ran with other settings" in str(run.card())
    # The optimizer goes on as it was in the checkpoint, whatever the options say.
    assert facts["execution"]["optimizer"]["groups"][0]["weight_decay"] == 0.25
    last = trained(tmp_path / "run", **again | {"max_steps": 6, "resume": str(tmp_path / "run" / "checkpoint-4")})
    assert last.facts()["resumed"][0] == first and last.facts()["resumed"][1]["until_step"] == 4
    assert last.facts()["resumed"][1]["arguments"] == {"learning_rate": 0.02, "max_steps": 4, "num_train_epochs": 1}


def test_neither_secret_nor_folder_is_recorded(tmp_path):
    (tmp_path / "accelerate.json").write_text('{"split_batches": true}')
    (tmp_path / "wrap.json").write_text("{}")
    args = FineTuningConfig(str(tmp_path / "run"), accelerator_config=str(tmp_path / "accelerate.json"), **QUIET)
    args.lr_scheduler_kwargs = {"file": str(tmp_path / "wrap.json"), "api_key": "hf_secret", "inner": [{"Token": "hf_secret"}]}
    found = arguments_of(args)
    assert found["accelerator_config"] == {"split_batches": True}
    assert found["lr_scheduler_kwargs"] == {"file": "wrap.json", "inner": [{}]}
    assert not {"hf_secret", str(tmp_path)} & set(json.dumps(found).split('"'))


class Thing:
    """No value."""


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.tensor(0.5), 0.5),
        ((0.9, {"a"}), [0.9, ["a"]]),
        ({1: Path("/home/me/x")}, {"1": "x"}),
        (len, "len"),
        (Thing(), "Thing"),
        (torch.nn.Linear(2, 2), "Linear"),
    ],
)
def test_a_value_is_written_as_json_can_hold_it(value, found):
    assert plain(value) == found


def test_shards_and_parallelism_are_json(monkeypatch):
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, transformer_cls_names_to_wrap=["ViTLayer"])
    found = json.loads(json.dumps(plain(plugin)))
    assert found["fsdp_version"] == 2 and found["transformer_cls_names_to_wrap"] == ["ViTLayer"]
    args = FineTuningConfig("x", use_cpu=True)
    args.parallelism_config = ParallelismConfig(dp_replicate_size=1)
    assert json.loads(json.dumps(arguments_of(args)))["parallelism_config"]["dp_replicate_size"] == 1


@pytest.mark.parametrize(
    "option", [{"lr_scheduler_kwargs": {"num_cycles": 1}}, {"accelerator_config": {"split_batches": True}}]
)
def test_a_victim_of_other_nested_options_is_another(option):
    def recipe(**given):
        return json.loads(json.dumps(arguments_of(VictimConfig("x", use_cpu=True, **given))))

    record = {"recipe": recipe(), "planted": None}
    assert differences(record, recipe()) == [] and differences(record, recipe(**option)) == list(option)


def test_a_victim_of_the_launchers_precision_is_another(monkeypatch):
    record = {"recipe": arguments_of(VictimConfig("x", use_cpu=True)), "planted": None}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert differences(record, arguments_of(VictimConfig("x", use_cpu=True))) == ["bf16"]
