"""The model card and the results table, rendered from the manifest: no number in them is typed by hand."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent / "templates"
FOLDER = "path/to/this/folder"  # in a card's example, until the repository's name is known
RESULT_NAMES = {
    "accuracy": ("accuracy", "ACC"),
    "asr": ("attack_success_rate", "ASR"),
    "ra": ("robust_accuracy", "RA"),
}


def _percent(rates: dict, key: str) -> str:
    """``91.20 % [90.40, 91.95]`` of a proportion as `Proportion.as_dict` writes it."""
    low, high = rates[f"{key}_ci95"]
    return f"{100 * rates[key]:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


def results_table(results: dict) -> str:
    """Markdown table of ACC, ASR and RA before and after, each with count and 95 % interval, and DER.

    Args:
        results: As `evaluation.results` makes it: fractions in [0, 1] with ``_ci95`` and ``_n``.

    Returns:
        The table, without a final line break.
    """

    rows = ["| | before | after | images |", "| --- | ---: | ---: | ---: |"]
    for key, (_, short) in RESULT_NAMES.items():
        if f"{key}_after" in results:
            count = results[f"{key}_after_n"]
            rows.append(f"| {short} | {_percent(results, f'{key}_before')} | {_percent(results, f'{key}_after')} | {count} |")
    if "der" in results:
        rows.append(f"| DER | | {results['der']:.4f} | |")
    return "\n".join(rows)


def rates_table(columns: dict[str, dict]) -> str:
    """Markdown table of ACC, ASR and RA, one column per model.

    Args:
        columns: Per heading the proportions ``accuracy``, ``asr`` and ``ra`` as `Proportion.as_dict` writes them.

    Returns:
        The table, without a final line break.
    """
    rows = ["| | " + " | ".join([*columns, "images"]) + " |", "| --- |" + " ---: |" * (len(columns) + 1)]
    first = next(iter(columns.values()))
    for key, (_, short) in RESULT_NAMES.items():
        if key in first:
            cells = [_percent(rates, key) if key in rates else "" for rates in columns.values()]
            rows.append("| " + " | ".join([short, *cells, str(first[f"{key}_n"])]) + " |")
    return "\n".join(rows)


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


def render_card(facts: dict, results: dict | None, model_name: str, hub_model_id: str | None = None) -> ModelCard:
    """Model card of a purified model.

    Args:
        facts: The manifest, `PurifyTrainer.facts`.
        results: As `evaluation.results` makes it; ``None`` if nothing was measured.
        model_name: Title of the card.
        hub_model_id: Repository the card is for, if any.

    Returns:
        A card whose metadata carry the lineage and, when measured, a ``model-index``.
    """
    source = facts["source"]
    card_data = ModelCardData(
        base_model=source["name"] if source["kind"] == "hub" else None,
        base_model_relation="finetune" if source["kind"] == "hub" else None,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "backdoor-defense", "purified", "d3_hf"],
        model_name=model_name,
        eval_results=_eval_results(results, facts["measured"]) if results else None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "purified_card.md"),
        model_name=model_name,
        facts=facts,
        results_table=results_table(results) if results else None,
        place=hub_model_id or FOLDER,
    )


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
