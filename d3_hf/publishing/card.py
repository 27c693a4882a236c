"""The model card and the results table, rendered from the manifest: no number in them is typed by hand."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .inspection.evidence import evidence_section
from .licences import UNKNOWN
from .metadata import TASKS, purified_metadata
from .readme import BEGIN, END, FOLDER
from .summary import encoder_headline, headline, rails_table
from .tables import audit_line, chosen_table, encoder_table, rates_table, results_table

TEMPLATES = Path(__file__).parent / "templates"
VICTIM_CARDS = {"classifier": "victim_card.md", "encoder": "encoder_victim_card.md", "clip": "clip_victim_card.md"}


def victim_table(facts: dict) -> str:
    """The rates of a victim beside those of a model without backdoor; ``facts`` as in ``victim.json``."""
    if not facts["measured"]:
        return "Nothing was measured."
    itself = "victim" if facts["planted"] else "this model"
    if facts.get("kind", "classifier") != "classifier":
        return encoder_table({itself if name == "victim" else name: found for name, found in facts["measured"].items()})
    headings = {"victim": itself, "clean_model": "model without backdoor"}
    columns = {heading: facts["measured"][key] for key, heading in headings.items() if facts["measured"].get(key)}
    return rates_table(columns) if columns else "Nothing was measured."


def render_victim_card(facts: dict, model_name: str) -> ModelCard:
    """Model card of a victim, a classifier or an encoder: its first line says that it is deliberately backdoored.

    Args:
        facts: The manifest, `VictimTrainer.facts` or `EncoderVictimTrainer.facts`.
        model_name: Title of the card.
    """
    kind = facts.get("kind", "classifier")
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS[kind],
        tags=[TASKS[kind], *(["backdoored-for-research"] if facts["planted"] else []), "d3_hf"],
        model_name=model_name,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / VICTIM_CARDS[kind]),
        model_name=model_name,
        facts=facts,
        table=victim_table(facts),
    )


def render_card(
    facts: dict,
    results: dict | None,
    model_name: str,
    hub_model_id: str | None = None,
    licence: dict | None = None,
    pictures: dict[str, str] | None = None,
) -> ModelCard:
    """Model card of a purified model.

    Args:
        facts: The manifest, `PurifyTrainer.facts`.
        results: As `measure.results` makes it; ``None`` if nothing was measured.
        model_name: Title of the card.
        hub_model_id: Repository the card is for, if any.
        licence: The source's, see `licences`; None where it is not known.
        pictures: Names of the files beside the card that it shows, and what they show.

    Returns:
        A card as it goes up: its metadata carry lineage and licence and, when a classifier was measured on a data set of the
        Hub, a ``model-index``; its text stands between the marks of `readme`.
    """
    licence, measured, kind = licence or UNKNOWN, facts["measured"], facts.get("kind", "classifier")
    is_encoder = kind != "classifier"
    outcome = _outcome(results, measured, is_encoder) if results else {}
    return ModelCard.from_template(
        purified_metadata(facts, results, model_name, licence),
        template_path=str(TEMPLATES / "purified_card.md"),
        begin=BEGIN,
        end=END,
        model_name=model_name,
        facts=facts,
        licence=licence,
        is_licensed=licence != UNKNOWN,
        pictures=pictures or {},
        is_encoder=is_encoder,
        is_clip=kind == "clip",
        **outcome,
        rails_table=rails_table(measured["rails"]) if measured.get("rails") else None,
        chosen_table=chosen_table(facts["chosen"]) if facts.get("chosen") else None,
        audit_line=audit_line(measured["audit"]) if measured.get("audit") else None,
        evidence=evidence_section(measured.get("evidence")),
        place=hub_model_id or FOLDER,
    )


def _outcome(results: dict, measured: dict, is_encoder: bool) -> dict[str, str]:
    """What was measured, in a sentence and in a table."""
    trigger, floor = measured.get("trigger"), (measured.get("floor") or {}).get("rates")
    if is_encoder:
        return {"headline": encoder_headline(results, trigger), "results_table": encoder_table(results)}
    return {"headline": headline(results, trigger), "results_table": results_table(results, floor)}


def name_deleted(card: str, deleted: list[str]) -> str:
    """The card with a section about the files that are deleted from the repository when it goes there; as it is if none are."""
    if not deleted:
        return card
    files = "\n".join(f"- `{name}`" for name in deleted)
    why = "They hold other weights than the purified ones, or go with them, and many programs would load them first:"
    return f"{card.rstrip()}\n\n## Deleted from this repository\n\n{why}\n\n{files}\n"
