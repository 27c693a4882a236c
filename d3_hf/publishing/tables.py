"""The Markdown tables of cards and summaries."""

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
