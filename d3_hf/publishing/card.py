"""The model card and the results table, rendered from the manifest: no number in them is typed by hand."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .tables import RESULT_NAMES, audit_line, chosen_table, encoder_table, rates_table, results_table

TEMPLATES = Path(__file__).parent / "templates"


FOLDER = "path/to/this/folder"  # in a card's example, until the repository's name is known


def victim_table(facts: dict) -> str:
    """The rates of a victim beside those of a model without backdoor; ``facts`` as in ``victim.json``."""
    headings = {"victim": "victim" if facts["planted"] else "this model", "clean_model": "model without backdoor"}
    columns = {heading: facts["measured"][key] for key, heading in headings.items() if facts["measured"].get(key)}
    return rates_table(columns) if columns else "Nothing was measured."


def render_victim_card(facts: dict, model_name: str) -> ModelCard:
    """Model card of a victim: its first line says that the model is deliberately backdoored.

    Args:
        facts: The manifest, `VictimTrainer.facts`.
        model_name: Title of the card.
    """
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "backdoored-for-research", "d3_hf"]
        if facts["planted"]
        else ["image-classification", "d3_hf"],
        model_name=model_name,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "victim_card.md"),
        model_name=model_name,
        facts=facts,
        table=victim_table(facts),
    )


def render_encoder_victim_card(facts: dict, model_name: str) -> ModelCard:
    """Model card of a victim that is an encoder: its first line says so.

    Args:
        facts: The manifest, `EncoderVictimTrainer.facts`.
        model_name: Title of the card.
    """
    tags = ["image-feature-extraction", "backdoored-for-research", "d3_hf"]
    card_data = ModelCardData(
        library_name="transformers", pipeline_tag="image-feature-extraction", tags=tags, model_name=model_name
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "encoder_victim_card.md"),
        model_name=model_name,
        facts=facts,
        table=encoder_table(facts["measured"]) if facts["measured"] else "Nothing was measured.",
    )


def render_card(
    facts: dict,
    results: dict | None,
    model_name: str,
    hub_model_id: str | None = None,
    licence: dict | None = None,
) -> ModelCard:
    """Model card of a purified model.

    Args:
        facts: The manifest, `PurifyTrainer.facts`.
        results: As `measure.results` makes it; ``None`` if nothing was measured.
        model_name: Title of the card.
        hub_model_id: Repository the card is for, if any.
        licence: The source's, see `source_licence`.

    Returns:
        A card whose metadata carry the lineage and, when a classifier was measured, a ``model-index``.
    """
    source, is_encoder = facts["source"], facts.get("kind") == "encoder"
    task = "image-feature-extraction" if is_encoder else "image-classification"
    table = encoder_table if is_encoder else results_table
    card_data = ModelCardData(
        base_model=source["name"] if source["kind"] == "hub" else None,
        base_model_relation="finetune" if source["kind"] == "hub" else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=[task, "backdoor-defense", "purified", "d3_hf"],
        model_name=model_name,
        eval_results=_eval_results(results, facts["measured"]) if results and not is_encoder else None,
        **(licence or {}),
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "purified_card.md"),
        model_name=model_name,
        facts=facts,
        results_table=table(results) if results else None,
        chosen_table=chosen_table(facts["chosen"]) if facts.get("chosen") else None,
        audit_line=audit_line(facts["measured"]["audit"]) if facts["measured"].get("audit") else None,
        place=hub_model_id or FOLDER,
    )


def name_deleted(card: str, deleted: list[str]) -> str:
    """The card with a section about the files that are deleted from the repository when it goes there; as it is if none are."""
    if not deleted:
        return card
    files = "\n".join(f"- `{name}`" for name in deleted)
    why = "They hold other weights than the purified ones, or go with them, and many programs would load them first:"
    return f"{card.rstrip()}\n\n## Deleted from this repository\n\n{why}\n\n{files}\n"


def _eval_results(results: dict, measured: dict) -> list[EvalResult]:
    data, found = measured.get("data") or "held-out images", []
    for key, (metric, short) in RESULT_NAMES.items():
        if f"{key}_after" in results:
            found.append(
                EvalResult(
                    task_type="image-classification",
                    dataset_type=data,
                    dataset_name=data,
                    dataset_config="as they are" if key == "accuracy" else f"triggered by {measured['trigger']['name']}",
                    dataset_split=measured.get("split"),
                    metric_type=metric,
                    metric_name=f"{short} after purification",
                    metric_value=results[f"{key}_after"],
                )
            )
    return found
