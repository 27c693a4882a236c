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
from .licences import FIELDS, UNKNOWN
from .manifest import CARD

logger = logging.getLogger(__name__)

BEGIN = "<!-- d3_hf: what stands from here on is replaced by the next push -->"
END = "<!-- d3_hf: up to here -->"
FOLDER = "path/to/this/folder"  # in a card's example, until the repository's name is known
SECTION = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
EXAMPLE = re.compile(r'(?:model=|load_classifier\(|load_encoder\(|from_pretrained\()"([^"\n]+)"')  # what it loads
TITLE = re.compile(r"^# .*", re.MULTILINE)
OF_THE_WEIGHTS = ("model-index",)  # metadata that speak of weights which are replaced
OURS = {"d3_hf", "purified"}  # tags of a card of ours


def named_for(card: str, folder_name: str, repo: str) -> str:
    """A card that was made before its repository had a name, or for another one, with the name in it; as it is if it has it.

    Args:
        card: Metadata and text.
        folder_name: Of the folder that it lies in, after which the card is called until it has a repository.
        repo: The repository's id: it goes into the example, and its name becomes that of the card and of the ``model-index``,
            unless they were given one of their own.
    """
    metadata, text = _parse(card)
    example = EXAMPLE.search(text)
    if example is None or (place := example[1]) == repo:
        return card
    made_up, name = {folder_name, place.rpartition("/")[2]}, repo.rpartition("/")[2]
    for entry in metadata.get("model-index", []):
        if entry["name"] in made_up:
            entry["name"] = name
    title = re.compile(rf"^# ({'|'.join(map(re.escape, sorted(made_up)))})$", re.MULTILINE)
    return _written(metadata, title.sub(lambda _: f"# {name}", text.replace(f'"{place}"', f'"{repo}"'), count=1))


def merge_card(card: str, theirs: str | None, repo: str) -> str:
    """The README that a push writes: the card as a section of what is there; byte for byte the card where nothing is.

    Args:
        card: The card of the purified model, metadata and text.
        theirs: The repository's README; None if it has none.
        repo: The repository's id.

    Returns:
        The owner's text, followed by the card's between `BEGIN` and `END`; where these are there already, what they enclose is
        replaced. Of the owner's metadata all stay but those that the card says anew and the results of the weights that go;
        licence, data sets, language and tags stay in any case, and that a licence is not known is nothing to tell the owner.
        A repository does not become its own base model.
    """
    ours, body = _parse(card)
    if theirs == card or theirs is None and SECTION.search(body) and ours.get("base_model") != repo:
        return card
    body = body.replace(BEGIN, "").replace(END, "")
    metadata, text = _parse(theirs) if theirs else ({}, "")
    if OURS <= set(listed(metadata.get("tags"))) and not SECTION.search(text):
        text = ""  # a card of an earlier version, which did not mark what it wrote
    if ours.get("base_model") == repo:
        del ours["base_model"], ours["base_model_relation"]
    kept = {name: value for name, value in metadata.items() if name not in OF_THE_WEIGHTS}
    merged = kept | ours | {name: _both(kept, ours, name) for name in ("tags", "datasets") if name in ours}
    merged = {name: value for name, value in merged.items() if name not in FIELDS} | _agreed_licence(kept, ours)
    if SECTION.sub("", text).strip():
        body = TITLE.sub("# Purification", body, count=1)
    section = f"{BEGIN}\n\n{body.strip()}\n\n{END}"
    text = SECTION.sub(lambda _: section, text, count=1) if SECTION.search(text) else f"{text.rstrip()}\n\n{section}\n"
    return _written(merged, text)


def _agreed_licence(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The owner's, or where that is not known the card's, unless it says no more than that."""
    known, found = _licence(theirs), _licence(ours)
    if known in ({}, UNKNOWN):
        return {} if not known and found == UNKNOWN else found
    return known


def _both(theirs: dict[str, Any], ours: dict[str, Any], name: str) -> list[Any]:
    return list(dict.fromkeys([*listed(theirs.get(name)), *listed(ours.get(name))]))


def _written(metadata: dict[str, Any], text: str) -> str:
    return f"---\n{yaml_dump(metadata, sort_keys=False).strip()}\n---\n\n{text.lstrip()}"


def source_licence(source: Source | None, finetuned_from: str | None = None) -> dict[str, Any]:
    """The licence that a model's source names, as metadata of a card; empty where none is found.

    Args:
        source: Of a folder its README is read, of a Hub id that on the Hub, of others nothing.
        finetuned_from: The Hub id that files came from, which is asked where they say nothing.
    """
    found = _named_licence(source)
    return found or (_named_licence(Source("hub", finetuned_from)) if finetuned_from else {})


def _named_licence(source: Source | None) -> dict[str, Any]:
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
        found["license_link"] = f"{constants.ENDPOINT}/{source.name}/blob/{source.revision or 'main'}/{link}"
    return found


def _licence(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: metadata[name] for name in FIELDS if name in metadata}


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
