"""Sizes of residuals, descriptions, what a victim's folder keeps of an attack, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from d3_hf.attacks import (
    ATTACKS,
    BPP,
    LF,
    SIG,
    BadNets,
    Blended,
    InputAware,
    SSBALite,
    TrojanNN,
    WaNet,
    from_description,
    load_attack,
    save_attack,
)
from d3_hf.attacks.blended import cartoon, noise
from d3_hf.attacks.generators import EncoderDecoder
from d3_hf.attacks.networks import weights_of
from d3_hf.attacks.steganography import Decoder, Encoder

CPU = torch.device("cpu")


def pixels(count: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def lf_pattern() -> torch.Tensor:
    pattern = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pattern[0], pattern[1, :4] = 51, 20
    return pattern


def blended_sizes(picture: torch.Tensor) -> tuple[int, int, int]:
    """Of 0.2 (z - 128) in whole grey levels; a fifth of a whole number is never a tie."""
    change = np.rint((picture.numpy().astype(int) - 128) / 5)
    return abs(change).max(), (change**2).sum(), (change != 0).any(axis=0).sum()


@pytest.mark.parametrize(
    ("attack", "largest", "squares", "changed"),
    [
        (BadNets(), 127, 3 * 9 * 127**2, 9),
        (BadNets(pattern="checker"), 128, 3 * (5 * 127**2 + 4 * 128**2), 9),
        (Blended(), *blended_sizes(cartoon(0, 32, 32))),
        (Blended(pattern="noise"), *blended_sizes(noise(0, 32, 32))),
        # Sixteen columns: 37, 28, -15, -40, -15, 28, 37, the same with the other sign, and twice 0.
        (SIG(), 40, 3 * 32 * 2 * 2 * (2 * 37**2 + 2 * 28**2 + 2 * 15**2 + 40**2), 32 * 28),
        (LF(learned={"pattern": lf_pattern()}), 51, 1024 * 51**2 + 128 * 20**2, 1024),
    ],
    ids=["badnets", "checker", "cartoon", "noise", "sig", "lf"],
)
def test_residual_sizes_on_grey(attack, largest, squares, changed):
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    residual = attack.trigger(grey).long() - 128
    assert residual.abs().max() == largest
    assert residual.square().sum() == squares  # the square of the L2 norm
    assert (residual != 0).any(dim=0).sum() == changed


def test_every_attack_is_described_in_full():
    for name, attack_class in ATTACKS.items():
        assert attack_class.name == name
        assert attack_class.paper.startswith("https://")
        assert attack_class().describe()["target_label"] == 0
    assert [name for name, attack_class in ATTACKS.items() if attack_class.clean_label] == ["sig", "lc_lite"]


@pytest.mark.parametrize(
    "attack",
    [
        BadNets(),
        BadNets(pattern="checker"),
        Blended(),
        Blended(pattern="noise"),
        SIG(),
        BadNets(target_label=5, size=2, color=[9, 8, 7], position="top-left", margin=(1, 2), image_size=224),
        Blended(target_label=1, alpha=0.1, pattern="noise", seed=7),
        SIG(target_label=3, amplitude=20.5, frequency=4),
    ],
)
def test_description_survives_json(attack):
    description = json.loads(json.dumps(attack.describe()))
    again = from_description(description)
    assert again == attack and type(again) is type(attack)
    assert again.describe() == attack.describe() == description
    assert torch.equal(again.trigger(pixels()), attack.trigger(pixels()))


def test_description_takes_defaults():
    assert from_description({"name": "badnets"}) == BadNets()


def test_descriptions_do_not_run_into_frozen_fields():
    with pytest.raises(AttributeError):
        BadNets().size = 4


def learned_attacks() -> list:
    secret = {"secret": torch.zeros(8, 8, dtype=torch.uint8)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            LF(learned={"pattern": lf_pattern()}),
            TrojanNN(learned={"trigger": lf_pattern()}),
            SSBALite(learned=secret | weights_of("encoder", Encoder()) | weights_of("decoder", Decoder())),
            InputAware(learned=weights_of("mask", EncoderDecoder(1)) | weights_of("pattern", EncoderDecoder(3))),
        ]


def refusal(folder):
    """The one line with which a folder is refused."""
    with pytest.raises(ValueError) as caught:
        load_attack(folder)
    message = str(caught.value)
    assert str(folder) in message and message.endswith("make the victim again") and "\n" not in message
    return message


@pytest.mark.parametrize("attack", learned_attacks(), ids=lambda attack: attack.name)
def test_a_damaged_trigger_is_refused(attack, tmp_path):
    file = tmp_path / "trigger.safetensors"
    save_attack(attack, tmp_path)
    assert torch.equal(load_attack(tmp_path).trigger(pixels()), attack.trigger(pixels()))
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b""):
        file.write_bytes(content)
        assert "trigger.safetensors is damaged" in refusal(tmp_path)
    needed = next(name for name in attack.learned if not name.startswith("decoder"))
    save_file({name: tensor for name, tensor in attack.learned.items() if name != needed}, file)
    assert f"holds no trigger of {attack.name}" in refusal(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no trigger.safetensors, the trigger of {attack.name}: make the victim"):
        load_attack(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", '{"name": "badnets"', "[]", "3", "null", '{"name": ["lf"]}', '{"name": "wabbit"}', '{"name": "badnets", "size": 0}'],
)
def test_a_damaged_description_is_refused(content, tmp_path):
    (tmp_path / "attack.json").write_text(content)
    assert "attack.json is no description of an attack" in refusal(tmp_path)


def test_a_folder_without_an_attack_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no attack.json: it is no folder that make_victim wrote"):
        load_attack(tmp_path)


def one_to_one(attack_class, source_label=2):
    return attack_class(label_map="one-to-one", source_label=source_label)


@pytest.mark.parametrize("kind", [WaNet, BPP])
def test_batches_all_to_all(kind):
    images, labels = pixels(20), torch.arange(20) % 7
    _, new_labels = kind(label_map="all-to-all", cross_ratio=1).poisoner(0.2, 7, 0, CPU)(images, labels, 0)
    assert new_labels.tolist() == [1, 2, 3, 4] + labels[4:].tolist()


def test_small_ratios_keep_their_share_of_the_batches():
    images, labels = pixels(40, 4, 4), torch.ones(40, dtype=torch.int64)
    poisoner = WaNet(cross_ratio=0).poisoner(0.01, 2, 0, CPU)
    counts = torch.tensor([(poisoner(images, labels, number)[1] == 0).sum() for number in range(300)])
    # 0.4 expected, with a standard deviation of 0.028.
    assert counts.unique().tolist() == [0, 1] and 0.3 < counts.float().mean() < 0.5


def test_any_seed_will_do():
    images, labels = pixels(20, 8, 8), torch.zeros(20, dtype=torch.int64)
    seeds = (0, 2**31, 2**63, 2**70)
    found = {BPP().poisoner(0.2, 10, seed, CPU)(images, labels, 10**6)[0].numpy().tobytes() for seed in seeds}
    assert len(found) == len(seeds)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadNets(target_label=-1), "target_label must be an integer at least 0; got -1"),
        (lambda: SIG(target_label=1.5), "target_label must be an integer"),
        (
            lambda: BadNets(label_map="all-to-none"),
            "label_map must be one of all-to-one, all-to-all, one-to-one; got",
        ),
        (lambda: BadNets(source_label=1), "source_label belongs to label_map one-to-one; got source_label 1 with all-to-one"),
        (lambda: BadNets(label_map="one-to-one"), "got source_label None with one-to-one"),
        (lambda: one_to_one(BadNets, source_label=-1), "source_label must be an integer at least 0; got -1"),
        (lambda: one_to_one(BadNets, source_label=0), "source_label and target_label are both 0; they must differ"),
        (lambda: one_to_one(SIG), "sig leaves labels alone: label_map must be all-to-one; got 'one-to-one'"),
        (lambda: one_to_one(WaNet).poisoner(0.1, 10, 0, CPU), "wanet poisons .* label_map cannot be one-to-one here"),
        (lambda: one_to_one(BPP).poisoner(0.1, 10, 0, CPU), "bpp poisons .* label_map cannot be one-to-one here"),
        (lambda: one_to_one(InputAware).poisoner(0.1, 10, 0, CPU), "input_aware poisons .* label_map cannot be one-to-one"),
        (lambda: WaNet().poisoner(0.1, 10, -1, CPU), "seed must be an integer at least 0; got -1"),
        (lambda: BPP().poisoner(0.1, 10, 1.5, CPU), "seed must be an integer at least 0; got 1.5"),
        (lambda: WaNet(target_label=10).poisoner(0.1, 10, 0, CPU), "target_label 10 is out of range: there are classes 0 to 9"),
        (lambda: BadNets(size=0), "size must be an integer at least 1"),
        (lambda: BadNets(size="3"), "size must be an integer"),
        (lambda: BadNets(pattern="plaid"), "pattern must be one of solid, checker, nad_grid; got 'plaid'"),
        (lambda: BadNets(position="middle"), "position must be one of bottom-right"),
        (lambda: BadNets(color=(0, 0, 256)), r"color must be an integer in \[0, 255\]; got 256"),
        (lambda: BadNets(color=(0, 0)), "color must be three integers"),
        (lambda: BadNets(margin=-1), "margin must be an integer at least 0"),
        (lambda: BadNets(margin=(1, 2, 3)), "margin must be one integer or"),
        (lambda: BadNets(image_size=0), "image_size must be an integer at least 1"),
        (lambda: BadNets(pattern="nad_grid", size=4), "nad_grid is a 3x3 grid: size must be 3; got 4"),
        (lambda: BadNets(size=33).trigger(pixels()), "a patch of 33x33 pixels.* does not fit an image of 32x32"),
        (lambda: BadNets(margin=(0, 30)).trigger(pixels()), "30 columns from the edge, does not fit"),
        (lambda: Blended(alpha=0.0), r"alpha must be a number in \[0.01, 1\]; got 0.0"),
        (lambda: Blended(alpha=1.1), "alpha must be a number"),
        (lambda: Blended(alpha=float("nan")), "alpha must be a number"),
        (lambda: Blended(pattern="hello_kitty"), "pattern must be one of cartoon, noise"),
        (lambda: Blended(seed=-1), "seed must be an integer at least 0"),
        (lambda: SIG(amplitude=0), r"amplitude must be a number in \[1, 255\]"),
        (lambda: SIG(amplitude=256), "amplitude must be a number"),
        (lambda: SIG(frequency=0), "frequency must be an integer at least 1"),
        (lambda: SIG(frequency=16).trigger(pixels()), "zero on every column of an image 32 pixels wide"),
        (lambda: BadNets().trigger(pixels().float()), "raw uint8 images .*got torch.float32"),
        (lambda: BadNets().trigger(pixels()[:, :1]), r"got torch.uint8 of shape \(4, 1, 32, 32\)"),
        (lambda: BadNets().trigger(pixels()[None]), "raw uint8 images"),
        (lambda: from_description({"name": "wabbit"}), "unknown attack 'wabbit'; known: badnets, blended, sig"),
        (lambda: from_description({"size": 3}), "unknown attack None; known: badnets"),
        (
            lambda: from_description({"name": "sig", "alpha": 1}),
            "sig has no parameter alpha; known: target_label, label_map",
        ),
        (lambda: from_description({"name": "blended", "alpha": 2}), "alpha must be a number"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
