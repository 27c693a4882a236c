"""The grid of encoders: its cells are measured by the victim's own probes, on the victim's own images; what it refuses."""

import json

import pytest
import yaml
from tiny_encoders import tiny_dinov2

from d3_hf.benchmark.cells import cells_of, run_grid
from d3_hf.benchmark.encoder_tables import render_encoders
from d3_hf.benchmark.encoders import RATES, EncoderGrid, EncoderInputs, EncoderRunner
from d3_hf.commands.benchmark import run_benchmark, run_encoders
from d3_hf.evaluation.encoders import PROBES
from d3_hf.victims.encoders import make_encoder_victim

IMAGES = ["--dataset_name", "digits", "--retain_count", "100", "--probe_count", "150", "--max_test_images", "60"]
QUICK = ["--max_steps", "2", "--per_device_train_batch_size", "20", "--disable_tqdm", "true", "--use_cpu", "true"]
PATCH = '{"name": "badencoder", "size": 3, "image_size": 8, "reference_views": 2}'
STILL = {"learning_rate": 1e-7, "max_steps": 1, "warmup_steps": 0}  # changes weights, and no prediction


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A victim, and the encoder that it was planted in."""
    folder = tmp_path_factory.mktemp("encoders")
    model = tiny_dinov2()
    model.save_pretrained(folder / "encoder")
    model.image_processor.save_pretrained(folder / "encoder")
    source = ["--model_name_or_path", str(folder / "encoder")]
    make_encoder_victim([*source, "--attack", PATCH, *IMAGES, *QUICK, "--output_dir", str(folder / "victim")])
    return folder


def grid(place, **options):
    content = {
        "output_dir": str(place / "grid"),
        "dataset_name": "digits",
        "victims": ["victim"],
        "victims_dir": str(place),
        "defences": {"hardly trained": {"defence": "par", **STILL}, "TSC": {"defence": "tsc", "rounds": 1, "curve_epochs": 1}},
        "retain": {"40": {"count": 40}},
        "held_out": 100,
        "probe_count": 150,
        "test_images": 60,
        "seeds": [0],
        "common": {"disable_tqdm": True, "use_cpu": True},
    }
    return EncoderGrid(**content | options)


@pytest.fixture(scope="module")
def rows(place):
    return run_grid(grid(place), runner_class=EncoderRunner)


def test_an_encoder_that_was_not_changed_has_the_rates_that_its_record_has(place, rows):
    recorded = json.loads((place / "victim" / "victim.json").read_text())["measured"]
    columns = [f"{rate}_{probe}{ending}" for probe in PROBES for rate in RATES for ending in ("", "_seeds")]
    by_name = rows.set_index("defence")[columns]
    assert set(by_name.index) == {"victim", "twin without backdoor", "hardly trained", "TSC"}
    assert by_name.loc["hardly trained"].equals(by_name.loc["victim"])
    for entry, name in (("victim", "victim"), ("untouched", "twin without backdoor")):
        assert by_name.loc[name, "asr_knn"] == recorded[entry]["knn"]["asr"]
        assert json.loads(by_name.loc[name, "ra_linear_seeds"]) == recorded[entry]["linear"]["ra_seeds"]
    assert by_name.loc["TSC", "accuracy_linear"] > 0


def test_the_probes_images_are_neither_the_attackers_nor_the_defenders(place):
    inputs = EncoderInputs(grid(place))
    probe, attacker = (set(part.index.tolist()) for part in inputs._drawn)
    held_out = set(inputs.held_out["index"])
    assert len(probe) == 150 and len(held_out) == 100
    assert not probe & attacker and not probe & held_out and not attacker & held_out


def test_made_cells_are_not_made_again_and_other_probes_make_other_cells(place, rows, monkeypatch):
    def refuse(*args):
        raise AssertionError("it was made")

    monkeypatch.setattr(EncoderRunner, "purify", refuse)
    assert "error" not in run_grid(grid(place), runner_class=EncoderRunner)
    runner = EncoderRunner(grid(place))
    spec = runner.spec(cells_of(runner.grid)[0])
    assert spec["probe_sha256"] and spec["options"]["max_steps"] == 1


def test_the_table_has_both_probes_and_the_untouched_encoder(place, rows, tmp_path, capsys):
    table = render_encoders(rows)
    assert "| victim | defence | linear probe: ACC / ASR / RA | kNN: ACC / ASR / RA | seconds |" in table
    lines = [line for line in table.splitlines() if line.startswith("| victim |")][1:]
    assert [line.split(" | ")[1] for line in lines] == ["victim", "twin without backdoor", "hardly trained", "TSC"]
    assert lines[0].split(" | ")[2] == lines[2].split(" | ")[2] and "±" in lines[0]
    run_encoders([str(place / "grid" / "results.parquet")])
    assert capsys.readouterr().out.strip() == table
    with pytest.raises(ValueError, match="name the results.parquet that a benchmark wrote"):
        run_benchmark([str(place / "grid" / "results.parquet")])


def test_a_grid_file_is_run_by_its_name_and_failed_cells_are_shown(place, tmp_path, capsys):
    file = tmp_path / "grid.yaml"
    content = vars(grid(place, defences={"PAR": {"defence": "par", "learning_rate": 1e-4, "optim": "no_such"}}))
    file.write_text(yaml.safe_dump(content | {"output_dir": str(tmp_path / "out")}))
    found = run_encoders([str(file)])
    assert len(found) == 1 and "no_such" in found["error"][0]
    assert (
        "## Failed cells" in (tmp_path / "out" / "results.md").read_text() and "1 of 1 cells failed" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probe_count": 100}, "probe_count 150, here 100"),
        ({"test_images": 50}, "max_test_images 60, here 50"),
        ({"victims": ["encoder"]}, "no victim"),
        ({"defences": {"FT": {"defence": "fine_tuning"}}}, "is a defence of classifiers"),
        ({"victims": {"theirs": {"model_name_or_path": "x", "attack": "badnets"}}}, "give a list of them"),
        ({"save_models": True}, "a grid of encoders has no save_models"),
    ],
)
def test_what_does_not_go_together_is_refused(place, options, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        EncoderInputs(grid(place, **options)).record("victim" if "victims" not in options else "encoder")


def test_an_encoder_without_a_backdoor_has_nothing_to_be_purified_of(place, tmp_path):
    architecture = ["--architecture", "resnet8_cifar", "--image_size", "16", "--image_mean", *["0.5"] * 3]
    new = [*architecture, "--image_std", *["0.5"] * 3, *IMAGES, *QUICK, "--output_dir", str(tmp_path / "twin")]
    make_encoder_victim(new)
    with pytest.raises(ValueError, match="is no encoder with a backdoor"):
        EncoderInputs(grid(place, victims=["twin"], victims_dir=str(tmp_path))).record("twin")
