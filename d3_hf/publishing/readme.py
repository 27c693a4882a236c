"""The README of a repository that has one: the owner's text and licence stay, and the card becomes a section of it."""

import logging
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import RepoCard, constants, hf_hub_download
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..files import first_line
from ..models.source import Source
from .details import listed
from .manifest import CARD

logger = logging.getLogger(__name__)

BEGIN = "<!-- d3_hf: what stands from here on is replaced by the next push -->"
END = "<!-- d3_hf: up to here -->"
SECTION = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
TITLE = re.compile(r"^# .*", re.MULTILINE)
LICENCE = ("license", "license_name", "license_link")
OF_THE_WEIGHTS = ("model-index",)  # metadata that speak of weights which are replaced
OURS = {"d3_hf", "purified"}  # tags of a card of ours


def merge_card(card: str, theirs: str | None, repo: str) -> str:
    """The README that a push writes: the card as a section of what is there.

    Args:
        card: The card of the purified model, metadata and text.
        theirs: The repository's README; None if it has none.
        repo: The repository's id.

    Returns:
        The owner's text, followed by the card's between `BEGIN` and `END`; where these are there already, what they enclose is
        replaced. Of the owner's metadata all stay but those that the card says anew and the results of the weights that go;
        licence, data sets, language and tags stay in any case. A repository does not become its own base model.
    """
    ours, body = _parse(card)
    metadata, text = _parse(theirs) if theirs else ({}, "")
    if OURS <= set(listed(metadata.get("tags"))) and not SECTION.search(text):
        text = ""  # a card of an earlier version, which did not mark what it wrote
    if ours.get("base_model") == repo:
        del ours["base_model"], ours["base_model_relation"]
    kept = {name: value for name, value in metadata.items() if name not in OF_THE_WEIGHTS}
    merged = kept | ours | {"tags": list(dict.fromkeys([*listed(kept.get("tags")), *listed(ours.get("tags"))]))}
    if any(name in kept for name in LICENCE):
        merged = {name: value for name, value in merged.items() if name not in LICENCE or name in kept} | _licence(kept)
    if SECTION.sub("", text).strip():
        body = TITLE.sub("# Purification", body, count=1)
    section = f"{BEGIN}\n\n{body.strip()}\n\n{END}"
    text = SECTION.sub(lambda _: section, text, count=1) if SECTION.search(text) else f"{text.rstrip()}\n\n{section}\n"
    return f"---\n{yaml_dump(merged, sort_keys=False).strip()}\n---\n\n{text.lstrip()}"


def source_licence(source: Source | None) -> dict[str, Any]:
    """The licence that the README of a model's source names, as metadata of a card; empty where none is found."""
    try:
        if source is not None and source.kind == "folder":
            file = Path(source.name).expanduser() / CARD
        elif source is not None and source.kind == "hub":
            file = Path(hf_hub_download(source.name, CARD, revision=source.revision))
        else:
            return {}
        found = _licence(_parse(file.read_text(encoding="utf-8"))[0])
    except Exception as error:  # no README, no network, no text: the card goes without, as it is no condition
        logger.info("the licence of %s is not known (%s)", source.name, first_line(error))
        return {}
    link = found.get("license_link")
    if link and ":" not in link and source.kind == "hub":  # a file of that repository
        found["license_link"] = f"{constants.ENDPOINT}/{source.name}/blob/{source.revision}/{link}"
    return found


def _licence(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: metadata[name] for name in LICENCE if name in metadata}


def _parse(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a README; metadata that are no mapping are left out with a warning."""
    try:
        card = RepoCard(text)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        logger.warning("the metadata of the README are no YAML mapping and are not kept (%s)", first_line(error))
        return {}, REGEX_YAML_BLOCK.sub("", text, count=1)
    metadata = card.data.to_dict()
    if False in (languages := listed(metadata.get("language"))):  # Norwegian, to YAML
        metadata["language"] = ["no" if language is False else language for language in languages]
    return metadata, card.text
