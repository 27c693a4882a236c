"""Markdown tables, and those of the rates on cards and in summaries."""

from collections.abc import Iterable, Sequence

RESULT_NAMES = {
    "accuracy": ("accuracy", "ACC"),
    "asr": ("attack_success_rate", "ASR"),
    "ra": ("robust_accuracy", "RA"),
    "pacc": ("poisoned_accuracy", "PACC"),
}
# By which encoders are measured, and a whole CLIP, as tables call them.
PROBES = {"linear": "linear probe", "knn": "kNN", "zero_shot": "zero-shot"}
_ROWS = {key: short for key, (_, short) in RESULT_NAMES.items()} | {"trigger_drift": "trigger drift"}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: names in the first column, on the left; numbers in the others, on the right.

    Args:
        header: What stands over each column.
        rows: As many cells each; what would end a cell or a line in them is escaped.

    Returns:
        The table, without a final line break.
    """
    return "\n".join(map(_row, [header, ["---"] + ["---:"] * (len(header) - 1), *rows]))


def _row(cells: Sequence[str]) -> str:
    texts = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)


def results_table(results: dict, floor: dict | None = None) -> str:
    """Markdown table of ACC, ASR, RA and PACC before and after, with counts and 95 % intervals, ACC drop, trigger drift, DER.

    Args:
        results: As `measure.results` makes it: fractions in [0, 1] with ``_ci95`` and ``_n``. What an earlier version did not
            measure has no row.
        floor: What `measure.rates` makes of a model without a backdoor, for a column of its own.

    Returns:
        The table, without a final line break.
    """

    def row(name: str, before: str, after: str, images: str, key: str = "") -> list[str]:
        beside = [] if floor is None else [_percent(floor, key) if key in floor else ""]
        return [name, before, after, *beside, images]

    rows = []
    for key, short in _ROWS.items():
        if f"{key}_after" in results:
            before, after = (_percent(results, f"{key}_{when}") for when in ("before", "after"))
            rows.append(row(short, before, after, str(results[f"{key}_after_n"]), key))
    if "accuracy_drop" in results:
        rows.insert(1, row("ACC drop", "", _percent(results, "accuracy_drop", "points"), str(results["accuracy_drop_n"])))
    if "der" in results:
        rows.append(row("DER", "", f"{results['der']:.4f}", ""))
    return markdown_table(["", "before", "after", *([] if floor is None else ["floor"]), "images"], rows)


def audit_line(audit: dict) -> str:
    """What became of ACC on the images that no decision saw, in a sentence; ``audit`` as `measure.paired_results` makes it."""
    before, after = (f"{100 * audit[f'accuracy_{when}']:.1f} %" for when in ("before", "after"))
    low, high = (f"{100 * end:.1f}" for end in audit["accuracy_drop_ci95"])
    return (
        f"Images that no decision saw: ACC {before} to {after} of {audit['accuracy_drop_n']} images ({audit['lost']} lost, "
        f"{audit['gained']} gained), the fall lies within [{low}, {high}] points (95 %)."
    )


def chosen_table(chosen: dict) -> str:
    """Markdown table of the recipes that were tried before one was chosen, in their order.

    Args:
        chosen: The manifest's entry ``chosen``: per recipe in ``tried`` its ``name``, ``floor``, ``seconds``, and unless it
            raised its validation ``accuracy`` as `Proportion.as_dict` writes it and its ``scores``, or ``stopped_at``, the
            share of its updates after which it was given up.

    Returns:
        The table, without a final line break; the chosen one is in bold.
    """
    scores = list(dict.fromkeys(name for row in chosen["tried"] for name in row.get("scores") or {}))
    rows = []
    for row in chosen["tried"]:
        name = f"**{row['name']}**" if row["name"] == chosen["recipe"] else row["name"]
        found = [f"{row['scores'][score]:.4g}" if score in (row.get("scores") or {}) else "" for score in scores]
        accuracy = _percent(row, "accuracy") if "accuracy" in row else row["error"]
        stopped = f" (stopped at {100 * row['stopped_at']:g} %)" if row.get("stopped_at") else ""
        rows.append([name, accuracy, row["floor"] + stopped, *found, f"{row['seconds']:.0f}"])
    header = ["recipe", "validation ACC", "floor", *(score.replace("_", " ") for score in scores), "seconds"]
    return markdown_table(header, rows)


def rates_table(columns: dict[str, dict]) -> str:
    """Markdown table of ACC, ASR, RA, PACC and trigger drift, one column per model.

    Args:
        columns: Per heading what `measure.rates` makes. What the first one lacks has no row.

    Returns:
        The table, without a final line break.
    """
    first = next(iter(columns.values()))
    rows = [
        [short, *(_percent(rates, key) if key in rates else "" for rates in columns.values()), str(first[f"{key}_n"])]
        for key, short in _ROWS.items()
        if key in first
    ]
    return markdown_table(["", *columns, "images"], rows)


def encoder_table(measured: dict) -> str:
    """Markdown table of ACC, ASR and RA of encoders, one column per encoder and probe, means over the seeds.

    Args:
        measured: Per encoder, as ``before`` or ``untouched``, what `measure_encoder` makes; entries of another form have no
            column.

    Returns:
        The table, without a final line break.
    """
    found = {name: rates for name, rates in measured.items() if isinstance(rates, dict) and rates.keys() & PROBES.keys()}
    return rates_table(
        {f"{name}, {PROBES[probe]}": rates[probe] for probe in PROBES for name, rates in found.items() if probe in rates}
    )


def _percent(rates: dict, key: str, unit: str = "%") -> str:
    """``91.2 % [90.4, 92.0]`` of a proportion as `Proportion.as_dict` writes it; without interval where it has none."""
    share = f"{100 * rates[key]:.1f} {unit}"
    if f"{key}_ci95" not in rates:
        return share
    low, high = rates[f"{key}_ci95"]
    return f"{share} [{100 * low:.1f}, {100 * high:.1f}]"
