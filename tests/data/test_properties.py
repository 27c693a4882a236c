"""What holds for all inputs: selections, triggers, retain sets and configurations, on inputs that hypothesis draws."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import SIZE, tiny_vit
from torch import nn

from d3_hf.attacks import BPP, SIG, BadNets, Blended, LFNoise, WaNet, from_description
from d3_hf.attacks.badnets import POSITIONS
from d3_hf.data.labels import retain_indices
from d3_hf.defenses.d3.config import HINGES, D3Config
from d3_hf.defenses.shared import geometry
from d3_hf.defenses.shared.selection import select_weights
from d3_hf.options.arguments import DataArguments
from d3_hf.options.parser import parse_arguments
from d3_hf.publishing.manifest import arguments_of
from d3_hf.training.config import BATCH_NORM_POLICIES

settings.register_profile("project", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("project")

# Selection -----------------------------------------------------------------------------------------------------------------

MODEL = tiny_vit()
LINEAR = [name for name, module in MODEL.named_modules() if isinstance(module, nn.Linear)]


def selected(target_modules):
    return [segment.name for segment in select_weights(MODEL, target_modules, (SIZE, SIZE))]


@given(st.sets(st.sampled_from(LINEAR), min_size=1))
def test_any_set_of_names_selects_exactly_those_in_the_models_order(names):
    expected = [f"{name}.weight" for name in LINEAR if name in names]
    assert selected(sorted(names)) == expected
    assert selected("|".join(map(re.escape, names))) == expected


@given(st.sampled_from(LINEAR), st.data())
def test_a_suffix_selects_all_that_end_with_it(name, data):
    parts = name.split(".")
    suffix = ".".join(parts[data.draw(st.integers(0, len(parts) - 1)) :])
    matching = [other for other in LINEAR if f".{other}".endswith(f".{suffix}")]
    others = [n for n, module in MODEL.named_modules() if f".{n}".endswith(f".{suffix}") and not isinstance(module, nn.Linear)]
    if others:  # "output" is a module around a linear layer in some networks
        with pytest.raises(ValueError, match="only linear and convolution layers"):
            selected([suffix])
    else:
        assert selected([suffix]) == [f"{other}.weight" for other in matching]


PATTERNS = st.text() | st.text("()[]{}*+?.|\\^$,:=!<0129aP-", max_size=12) | st.from_regex(r"(\w|\.|\(\?|\{\d+\}){1,10}")


@settings(max_examples=100)
@given(PATTERNS | st.lists(st.text(max_size=8), max_size=3))
def test_any_selection_is_made_or_refused_by_a_value_error(target_modules):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of re, about patterns that may come to mean something else
        try:
            assert selected(target_modules)
        except ValueError as error:
            assert "target_modules=" in str(error)


@pytest.mark.parametrize("pattern", ["a{99999999999999999999}", "(" * 5000 + ")" * 5000, "(?P<a>x)(?P<a>y)", "\\", "(?<=a+)b"])
def test_patterns_that_re_cannot_compile(pattern):
    with pytest.raises(ValueError, match="is not a regular expression|matches no module"):
        selected(pattern)


# Triggers ------------------------------------------------------------------------------------------------------------------


def badnets(draw):
    size = draw(st.integers(1, 3))
    options = dict(pattern=draw(st.sampled_from(["solid", "checker"])), position=draw(st.sampled_from(POSITIONS)))
    return BadNets(size=size, margin=draw(st.integers(0, 2)), color=draw(st.tuples(*[st.integers(0, 255)] * 3)), **options)


MADE = {
    "badnets": badnets,
    "blended": lambda draw: Blended(
        alpha=draw(st.floats(0.01, 1)), pattern=draw(st.sampled_from(["cartoon", "noise"])), seed=draw(st.integers(0, 99))
    ),
    "sig": lambda draw: SIG(amplitude=draw(st.floats(1, 255)), frequency=draw(st.sampled_from([1, 3, 5, 7]))),
    "lf_noise": lambda draw: LFNoise(amplitude=draw(st.floats(0.01, 1)), seed=draw(st.integers(0, 99))),
    "wanet": lambda draw: WaNet(
        grid_size=draw(st.integers(2, 8)), strength=draw(st.floats(0.01, 4)), seed=draw(st.integers(0, 9))
    ),
    "bpp": lambda draw: BPP(levels=draw(st.integers(2, 255)), dithering=draw(st.booleans())),
}


@pytest.mark.parametrize("name", MADE)
@given(data=st.data())
def test_a_trigger_keeps_shape_type_and_neighbours(name, data):
    attack = MADE[name](data.draw)
    shape = (data.draw(st.integers(1, 3)), 3, data.draw(st.integers(8, 64)), data.draw(st.integers(8, 64)))
    assume(name != "sig" or 2 * attack.frequency % shape[3])  # its sinusoid is zero on every column, which it refuses
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    original, state = images.clone(), torch.get_rng_state()
    triggered = attack.trigger(images)
    assert triggered.shape == shape and triggered.dtype == torch.uint8
    assert torch.equal(images, original) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(triggered, torch.stack([attack.trigger(image) for image in images]))
    assert from_description(json.loads(json.dumps(attack.describe()))) == attack


@given(st.data())
def test_badnets_touches_nothing_outside_of_its_patch(data):
    attack, (height, width) = badnets(data.draw), (data.draw(st.integers(8, 64)), data.draw(st.integers(8, 64)))
    grey = [torch.full((1, 3, height, width), level, dtype=torch.uint8) for level in (0, 128, 255)]
    triggered = [attack.trigger(image) for image in grey]
    patch = triggered[0] == triggered[2]  # what does not depend on the image
    assert all(torch.equal(new[~patch], old[~patch]) for new, old in zip(triggered, grey, strict=True))
    scale = max(1, (2 * min(height, width) + 32) // 64)
    side, gap = attack.size * scale, attack.margin * scale
    inside = torch.zeros(height, width, dtype=torch.bool)
    rows = slice(height - gap - side, height - gap) if attack.position.startswith("bottom") else slice(gap, gap + side)
    columns = slice(width - gap - side, width - gap) if attack.position.endswith("right") else slice(gap, gap + side)
    inside[rows, columns] = True
    assert torch.equal(patch, inside.expand_as(patch))


# Retain sets ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=2, max_size=80), st.floats(0.05, 0.95), st.integers(0, 2**32), st.data())
def test_a_retain_set_is_a_part_of_the_asked_size_and_the_same_each_time(labels, fraction, seed, data):
    labels, names = np.array(labels), list("abcd")
    count = data.draw(st.integers(1, len(labels)))
    for size, options in ((count, dict(count=count)), (round(fraction * len(labels)), dict(fraction=fraction))):
        if size < 1:
            with pytest.raises(ValueError, match="between 1 and all"):
                retain_indices(labels, names, seed=seed, **options)
            continue
        rows = retain_indices(labels, names, seed=seed, **options)
        assert len(rows) == size == len(set(rows)) and set(rows) <= set(range(len(labels)))
        assert rows.tolist() == sorted(rows) == retain_indices(labels, names, seed=seed, **options).tolist()


@given(st.integers(1, 12), st.integers(0, 1000), st.integers(1, 48))
def test_a_balanced_retain_set_is_even(each, seed, count):
    labels = np.arange(4 * each) % 4
    if -(-count // 4) > each:
        with pytest.raises(ValueError, match="balanced retain set|between 1 and all"):
            retain_indices(labels, list("abcd"), count=count, balanced=True, seed=seed)
        return
    found = np.bincount(labels[retain_indices(labels, list("abcd"), count=count, balanced=True, seed=seed)], minlength=4)
    assert found.sum() == count and found.max() - found.min() <= 1


# Configurations ------------------------------------------------------------------------------------------------------------

CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "lambda_clean": st.floats(1e-3, 1e3),
        "epsilon": st.none() | st.floats(0, 10),
        "dual_rate": st.floats(0, 10),
        "hinge": st.sampled_from(HINGES),
        "target_modules": st.sampled_from(["head", "all-linear", ".*query"]) | st.lists(st.sampled_from(LINEAR), min_size=1),
        "warm_start": st.sampled_from(geometry.WARM_STARTS),
        "projection": st.sampled_from(geometry.PROJECTIONS),
        "active_set": st.none() | st.booleans(),
        "batch_norm": st.sampled_from(BATCH_NORM_POLICIES),
        "learning_rate": st.floats(0, 1),
        "num_train_epochs": st.integers(1, 100) | st.floats(0.5, 10),
        "seed": st.integers(0, 2**31),
        "horizontal_flip": st.booleans(),
        "crop_padding": st.integers(0, 8),
    },
).filter(lambda options: not (options.get("dual_rate") and options.get("hinge") == "batch"))  # which D3Config refuses


@pytest.mark.parametrize("form", ["yaml", "json", "arguments"])
@given(options=CONFIGS)
def test_a_configuration_survives_being_written_down(tmp_path_factory, form, options):
    options = {"use_cpu": True, "output_dir": "x"} | options
    config = D3Config(**options)
    if form == "yaml":
        file = tmp_path_factory.mktemp("config") / "config.yaml"
        file.write_text(yaml.safe_dump(options))
        _, again = parse_arguments([DataArguments, D3Config], [str(file)])
    elif form == "json":
        _, again = parse_arguments([DataArguments, D3Config], [], json.loads(json.dumps(options)))
    else:
        again = D3Config(output_dir="x", **json.loads(json.dumps(arguments_of(config))))
    assert again.to_dict() == config.to_dict() and arguments_of(again) == arguments_of(config)
