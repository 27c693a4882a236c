"""What a purified model's card says in its metadata, which the Hub reads."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .names import HUB_ID
from .tables import RESULT_NAMES

TASKS = {  # as the Hub calls them
    "classifier": "image-classification",
    "encoder": "image-feature-extraction",
    "clip": "zero-shot-image-classification",
}
SPLIT = re.compile(r"\w+(\.\w+)*")


def hub_data(name: str | None) -> str | None:
    """A data set's Hub id, where its public name is one: files and folders are named without their place, `digits` has none."""
    return name if name and HUB_ID.fullmatch(name) else None


def is_public(name: str | None) -> bool:
    """Whether a data set's images may be shown to whoever sees the card: one of the Hub, or the digits of scikit-learn."""
    return name == "digits" or hub_data(name) is not None


def purified_metadata(facts: dict, results: dict | None, model_name: str, licence: dict[str, Any]) -> ModelCardData:
    """The metadata of a purified model's card.

    Args:
        facts: The manifest.
        results: What ``all_results.json`` holds; None if nothing was measured.
        model_name: Title of the card.
        licence: See `licences`.

    Returns:
        Lineage, licence, library, the data set that was trained on, and a classifier's ``model-index``, each only where it is
        known. Data sets are those of the Hub: readers cannot look up others, and what was measured on them stands in the text.
    """
    source, data = facts["source"], hub_data(facts["retain"].get("source"))
    kind = facts.get("kind", "classifier")
    found = _eval_results(results, facts["measured"]) if results and kind == "classifier" else []
    return ModelCardData(
        base_model=source["name"] if source["kind"] == "hub" else None,
        base_model_relation="finetune" if source["kind"] == "hub" else None,
        datasets=[data] if data else None,
        library_name=facts["network"]["library"],
        pipeline_tag=TASKS[kind],
        tags=[TASKS[kind], "backdoor-defense", "purified", "d3_hf"],
        model_name=model_name if found else None,  # the index's
        eval_results=found or None,
        **licence,
    )


def _eval_results(results: dict, measured: dict) -> list[EvalResult]:
    """A result for each rate, its interval and its trigger among the arguments of the metric."""
    if not (data := hub_data(measured.get("data"))):
        return []
    split, found = measured.get("split"), []
    for key, (metric, short) in RESULT_NAMES.items():
        name = f"{key}_after"
        if name in results:
            arguments = {"images": results[f"{name}_n"], "ci95": results[f"{name}_ci95"]}
            found.append(
                EvalResult(
                    task_type=TASKS["classifier"],
                    dataset_type=data,
                    dataset_name=data,
                    dataset_config=measured.get("configuration"),
                    dataset_split=split if split and SPLIT.fullmatch(split) else None,  # not "rest of train"
                    metric_type=metric,
                    metric_name=f"{short} after purification",
                    metric_value=results[name],
                    metric_args=arguments if key == "accuracy" else arguments | {"trigger": measured["trigger"]},
                )
            )
    return found
