"""Where a purification starts near a public base without being told to, and where it does not."""

import logging

import pytest
from tiny import tiny_resnet, tiny_vit
from tiny_trained import base_of, trained

from d3_hf.auto.config import AutoConfig
from d3_hf.commands.purify import _settle_base
from d3_hf.defenses import configuration
from d3_hf.models import likely_bases


@pytest.fixture
def public(monkeypatch):
    """As if the only public model of tiny_vit's architecture lay in a folder."""
    found = []
    monkeypatch.setattr(likely_bases, "PUBLIC", [("vit", {}, found)])
    return found


def settled(folder, make=tiny_vit, config=None, **options):
    args = (config or configuration("d3"))(str(folder), use_cpu=True, **options)
    _settle_base(trained(make), args)
    return getattr(args, "base_model", "no such option")


@pytest.mark.parametrize("config", [configuration("d3"), AutoConfig])
def test_the_base_is_looked_for(config, public, tmp_path, caplog):
    public.append(base_of(tiny_vit))
    assert settled(tmp_path, config=config) == base_of(tiny_vit)
    assert "which this was fine-tuned from, by its weights; not so with --base_model none" in caplog.text


def test_it_is_not_looked_for_where_something_else_is_asked_for(public, tmp_path, caplog):
    public.append(base_of(tiny_vit))
    assert settled(tmp_path, base_model="none") is None
    assert settled(tmp_path, base_model="mine") == "mine"
    assert settled(tmp_path, make=tiny_resnet) is None
    assert settled(tmp_path, config=configuration("fine_tuning")) == "no such option"
    assert not caplog.records


def test_a_base_that_is_not_found_costs_a_warning_and_no_run(public, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert settled(tmp_path) is None and not caplog.records
        public.append(str(tmp_path / "absent"))
        assert settled(tmp_path) is None
    assert "not starting near a public base" in caplog.text and "absent" in caplog.text
