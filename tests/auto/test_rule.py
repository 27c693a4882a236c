"""Split, floor, scores, ladder and rule: pure functions against slow references and planted truths."""

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLASSES, SIZE, tiny_resnet, tiny_vit
from tiny_trained import base_of

from d3_hf.assurance.canary import canary
from d3_hf.assurance.latent_shift import latent_shift
from d3_hf.auto import thoroughness
from d3_hf.auto.choose import Tried, choose, walked
from d3_hf.auto.early import LEAST, checks_at, is_hopeless
from d3_hf.auto.floor import STANDARD_ERRORS, images_needed, keeps_floor, standard_error
from d3_hf.auto.ladder import MOST, read_ladder
from d3_hf.auto.plan import Rung
from d3_hf.auto.run import minutes_said, seconds_left
from d3_hf.auto.split import split
from d3_hf.auto.thoroughness import RULE, SCORES, evenness, feature_distance, reluctance
from d3_hf.data.images import RawImages
from d3_hf.defenses import defence
from d3_hf.evaluation.paired import PairedTable
from d3_hf.models.head import find_head
from d3_hf.training.config import BY_RULE


def paired(n, lost, gained):
    return PairedTable(n - lost - gained, lost, gained, 0)


SHARES = {"tune": 0.6, "validate": 0.2, "audit": 0.2}


# The split -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=5, max_size=80), st.integers(0, 3))
def test_the_split_is_disjoint_covering_and_stratified(labels, seed):
    labels = np.array(labels)
    parts = vars(split(labels, seed))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    for number in set(labels.tolist()):
        count = int(np.sum(labels == number))
        for name, share in SHARES.items():
            of_class = int(np.sum(labels[parts[name]] == number))
            assert of_class == (name == "tune") if count == 1 else abs(of_class - share * count) < 1
            assert of_class >= 1 or count < (2 if name == "tune" else 5)


def test_the_split_is_drawn_by_its_seed():
    labels = np.arange(300) % 10
    first, again, other = (split(labels, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in SHARES)
    assert not np.array_equal(first.validate, other.validate)
    assert first.counts() == {"tune": 180, "validate": 60, "audit": 60}
    assert np.array_equal(np.bincount(labels[first.validate]), [6] * 10)
    assert np.array_equal(first.retained, np.setdiff1d(np.arange(300), first.audit))


def test_with_seven_images_a_class_every_part_has_every_class():
    labels = np.arange(301) % 43
    parts = split(labels, 0)
    assert all(len(np.unique(labels[getattr(parts, name)])) == 43 for name in SHARES)


def test_too_few_images_to_split():
    with pytest.raises(ValueError, match="4 images cannot be split into three parts"):
        split(np.zeros(4, np.int64), 0)


# The floor -------------------------------------------------------------------------------------------------------------


def test_the_floor_is_that_of_the_images_one_by_one():
    for n in range(1, 25):
        for lost in range(n + 1):
            for gained in range(n + 1 - lost):
                changes = np.array([1] * lost + [-1] * gained + [0] * (n - lost - gained))
                table, error = paired(n, lost, gained), np.std(changes) / np.sqrt(n)
                assert table.drop == pytest.approx(changes.mean()) and standard_error(table) == pytest.approx(error)
                for allowed in (0.0511, 0.2013):
                    assert keeps_floor(table, allowed) == (changes.mean() + STANDARD_ERRORS * error <= allowed)


def test_a_model_that_answers_alike_keeps_every_floor():
    assert all(keeps_floor(paired(n, 0, 0), allowed) for n in (1, 60, 500) for allowed in (0, 0.05, 1))
    assert not keeps_floor(paired(60, 3, 0), 0.05) and keeps_floor(paired(500, 15, 5), 0.05)
    assert keeps_floor(paired(60, 60, 0), 1)  # 1 turns it off


def test_images_needed_are_those_of_which_one_is_allowed():
    assert [images_needed(allowed) for allowed in (0.05, 0.07, 1, 0)] == [20, 15, 1, 1]


# The early stop --------------------------------------------------------------------------------------------------------


def test_a_trial_is_hopeless_far_below_the_floor():
    def right(count, of=100, before=80):
        return PairedTable(min(count, before), max(0, before - count), max(0, count - before), of - max(count, before))

    for share, least in ((1 / 2, 20), (3 / 4, 40)):
        assert is_hopeless(right(least - 1), share, 0.05) and not is_hopeless(right(least), share, 0.05)
        assert not any(is_hopeless(right(count), share, 1.0) for count in range(101))  # a floor that is turned off
        assert not is_hopeless(right(least - 1), share, 0.95)  # and one that lies lower still
    assert not is_hopeless(right(5, before=5), 3 / 4, 0.0)  # as bad as the suspicious model


def test_a_trial_is_looked_at_at_half_and_at_three_quarters_and_not_at_its_end():
    assert checks_at(300) == {150: 1 / 2, 225: 3 / 4} and checks_at(4) == {2: 1 / 2, 3: 3 / 4}
    assert checks_at(3) == {2: 1 / 2} and checks_at(2) == {1: 1 / 2} and checks_at(1) == {}
    for updates in range(1, 100):
        for update, share in checks_at(updates).items():
            assert share * updates <= update < min(updates, share * updates + 1) and share in LEAST


# The rule --------------------------------------------------------------------------------------------------------------


def tried(place, holds, **further):
    return Tried(f"recipe {place}", place, 1.0, paired(100, 0 if holds else 30, 0), scores={"place": place}, **further)


@settings(deadline=None)
@given(st.sets(st.integers(0, 11), min_size=1), st.integers(0, 11), st.integers(-1, 11), st.integers(1, 12))
def test_the_best_recipe_is_found_on_a_ladder_with_a_planted_truth(available, start, truth, budget):
    """Ladders with gaps, whose recipes keep the floor up to the truth and erase more the higher they stand."""
    places = walked(start, budget, available, lambda place: place <= truth)
    assert len(places) == len(set(places)) <= budget and available.issuperset(places)
    found, is_above = choose([tried(place, place <= truth) for place in places], 0.05, "place")
    above = [place for place in places if place <= truth]
    assert (found.place, is_above) == ((max(above), True) if above else (min(places), False))
    if budget == 12:
        best = max((place for place in available if place <= truth), default=min(available))
        assert found.place == best


def test_the_score_that_is_asked_for_decides():
    one, two = (
        Tried(name, place, 1.0, paired(100, 0, 0), scores={"place": place, "feature_distance": moved})
        for name, place, moved in (("gentle", 0, 0.8), ("severe", 1, 0.3))
    )
    assert choose([one, two], 0.05, "place")[0] is two and choose([two, one], 0.05, "feature_distance")[0] is one
    assert RULE in SCORES


def test_what_raised_is_never_chosen():
    raised = Tried("raised", 5, 1.0, error="the clean loss is nan")
    assert choose([raised, tried(2, False), tried(1, False)], 0.05, "place")[0].place == 1
    with pytest.raises(RuntimeError, match="no recipe could be tried: raised: the clean loss is nan"):
        choose([raised], 0.05, "place")


def test_what_was_given_up_is_never_above_the_floor_and_taken_last():
    given_up = tried(1, True, stopped_at=0.5)
    assert not given_up.holds(1.0)
    assert choose([given_up, tried(3, False), tried(2, False)], 0.05, "place") == (tried(2, False), False)
    assert choose([given_up], 0.05, "place") == (given_up, False)


# The time --------------------------------------------------------------------------------------------------------------


def test_the_time_left_is_that_of_what_was_tried():
    rung = Rung(3, None, {}, {}, updates=300, final_updates=400)
    ran = [Tried("FT", 1, 60.0, updates=300), Tried("stopped", 2, 30.0, updates=150, stopped_at=0.5)]  # 0.2 s an update
    assert seconds_left(ran, rung, trials=2) == pytest.approx(0.2 * (2 * 300 + 400))
    assert seconds_left([*ran, Tried("raised", 4, 100.0, error="diverged")], rung, 0) == pytest.approx(80)
    assert seconds_left([Tried("raised", 4, 100.0, error="diverged")], rung, 1) is None
    assert [minutes_said(s) for s in (20, 60, 200)] == ["less than a minute", "about 1 minute", "about 3 minutes"]


# Thoroughness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_the_distance_of_features_is_that_of_images_one_by_one(make):
    suspect, purified = make(0).train(), make(1).eval()
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    head = find_head(suspect, (16, 16))

    def feature(model, image):
        seen = []
        hook = model.get_submodule(head).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten()))
        with torch.no_grad():
            model(pixel_values=image[None])
        hook.remove()
        return seen[0] / seen[0].norm()

    found = feature_distance(suspect, purified, head, pixels.split(4))
    assert suspect.training and not purified.training  # as they were
    suspect.eval()
    slow = [(feature(purified, image) - feature(suspect, image)).square().sum().item() for image in pixels]
    assert found == pytest.approx(np.mean(slow), rel=1e-4)
    assert feature_distance(suspect, suspect, head, [pixels]) == 0


def test_evenness_and_reluctance_are_what_the_signals_say(monkeypatch):
    labels = torch.arange(60) % CLASSES
    pixels = torch.randint(0, 256, (60, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = RawImages(pixels, labels, [f"LABEL_{k}" for k in range(CLASSES)])
    model = tiny_vit()
    assert evenness(model, images) == -latent_shift(model, images).statistic <= 0
    assert -1 <= reluctance(model, images) == -canary(model, images).statistic <= 0
    monkeypatch.setattr(thoroughness, "MOST_CLASSES", CLASSES - 1)
    with pytest.raises(ValueError, match=f"with {CLASSES} classes it takes hours"):
        evenness(model, images)


# The ladder ------------------------------------------------------------------------------------------------------------


def test_the_ladder_of_the_package(tmp_path):
    recipes = read_ladder()
    assert len(recipes) <= MOST and sorted(str(recipe.needs) for recipe in recipes if recipe.start) == ["None", "base"]
    for recipe in recipes:
        assert not recipe.options.keys() & {*BY_RULE, "max_steps"}  # the schedule is the network's
        base = {"base_model": base_of(tiny_vit)} if recipe.needs == "base" else {}
        defence(recipe.defence)[0](str(tmp_path), use_cpu=True, **recipe.options, **base)
        assert recipe.needs == "base" or recipe.defence != "base_tuning"


FT = {"name": "FT", "defence": "fine_tuning"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"recipes": []}, "must hold `recipes`, a list of 1 to 12"),
        ({"recipes": [FT | {"name": str(number)} for number in range(13)]}, "a list of 1 to 12"),
        ({"recipes": [FT], "seed": 1}, "and nothing else"),
        ({"recipes": [FT, FT]}, "several recipes called FT"),
        ({"recipes": [{"name": "FT"}]}, "recipe 1 must be a mapping with name and defence"),
        ({"recipes": [FT | {"rung": 1}]}, "recipe 1 must be a mapping"),
        ({"recipes": [FT | {"name": 1}]}, "recipe 1: name must be str; got 1, a int"),
        ({"recipes": [FT | {"defence": "unheard"}]}, "unknown defence 'unheard'; known: d3, "),
        ({"recipes": [FT | {"rate": 0}]}, "recipe 1: rate must be a number above 0; got 0"),
        ({"recipes": [FT | {"rate": "half"}]}, "recipe 1: rate must be a number above 0; got 'half'"),
        ({"recipes": [FT | {"needs": "luck"}]}, "needs must be base, or be left out; got 'luck'"),
        ({"recipes": [FT | {"options": {"lambda_clean": 1}}]}, "fine_tuning has no option lambda_clean"),
        ({"recipes": [FT | {"options": {"push_to_hub": True}}]}, "push_to_hub is no recipe's: give it to the command"),
        ({"recipes": [FT | {"options": {"sam_rho": "1e-4"}}]}, "sam_rho must be a number, and '1e-4' is text"),
        ({"recipes": [FT | {"options": {"sam_rho": None}}]}, "sam_rho must be float; got None"),
        ({"recipes": [FT | {"start": True}, FT | {"name": "2", "start": True}]}, "says `start` of several recipes"),
    ],
)
def test_a_ladder_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_ladder(tmp_path / "ladder.yaml")
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        read_ladder(tmp_path / "absent.yaml")
