"""What `check` would have said of each model of a zoo, from the rows of its cells alone.

The twins of the half `calibrate` are the null of one kind, on one set of images and seed; each model of the half `judge` is a
suspect beside them, by the very test of `check` (`inspection.suspicion`). With x and t of `assurance.calibration`, by which p
compares models, suspects have an order that is close to that of their p, and finer. The models of `calibrate`, on which the
test was chosen, are compared with the same twins, each twin with the others: beside the rates of `judge` they show what
choosing gained.
"""

import json
import math
from typing import Any

import numpy as np
import pandas
from scipy.stats import spearmanr

from ..assurance.calibration import ALARM_AT, twins_needed
from ..assurance.finding import Finding
from ..benchmark.tables import split
from ..evaluation.metrics import Proportion
from ..inspection.measured import MeasuredRates
from ..inspection.null import Kind, Null
from ..inspection.suspicion import Suspicion, twin_of
from .study import CALIBRATE, JUDGE

# A backdoor that works less often was not planted: such a model counts neither as one with a backdoor nor as one without. This
# project's, below the 30 to 50 % of thinned backdoors.
LEAST_ASR = 0.2
BACKDOORED, IN_VAIN, TRUSTED = "backdoor", "planted in vain", "no backdoor"
KEY = ["retain", "seed"]  # of which images were read
TOGETHER = "all together"  # the test by all signals, in place of one


def state_of(row: pandas.Series) -> str:
    """What a model is, by what was planted and how often it works."""
    if not isinstance(row["attack"], str):
        return TRUSTED
    return BACKDOORED if row["asr"] >= LEAST_ASR else IN_VAIN


def kind_of_planting(victim: str) -> str:
    """``1percent`` of ``zoo-judge/1percent-2``: what stands before the number."""
    return victim.rpartition("/")[2].rpartition("-")[0] or victim.rpartition("/")[2]


def findings_of(row: pandas.Series) -> dict[str, Finding | str]:
    """The findings of a row, as they were before they were written, without their details."""
    names, found = Kind(**json.loads(row["kind"])).classes, dict[str, Finding | str]()
    for signal, facts in json.loads(row["findings"]).items():
        if "not_applicable" in facts:
            found[signal] = facts["not_applicable"]
        else:
            suspect = names.index(facts["suspect_class"])
            found[signal] = Finding(signal, np.array(facts["scores"]), facts["statistic"], suspect, list(names))
    return found


def read(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of models that were read, with their ``state``, and a ``statistic: S`` and a ``suspect: S`` of each signal S."""
    done, _ = split(rows)
    found = []
    for _, row in done.iterrows():
        one = row.to_dict() | {"state": state_of(row), "planting": kind_of_planting(row["victim"])}
        for signal, finding in findings_of(row).items():
            is_read = isinstance(finding, Finding)
            one[f"statistic: {signal}"] = finding.statistic if is_read else math.nan
            one[f"suspect: {signal}"] = finding.class_names[finding.suspect_class] if is_read else None
        found.append(one)
    return pandas.DataFrame(found)


def signals_in(frame: pandas.DataFrame) -> list[str]:
    """The signals of a table that `read` or `verdicts` made."""
    return [name.removeprefix("statistic: ") for name in frame.columns if name.startswith("statistic: ")]


def null_of(rows: pandas.DataFrame) -> Null | None:
    """The twins of the half `calibrate`, of one set of images and seed; None where there are none.

    Raises:
        ValueError: Two are of different kinds, or the same model.
    """
    chosen = rows[(rows["half"] == CALIBRATE) & ~rows["attack"].map(lambda name: isinstance(name, str))]
    if not len(chosen):
        return None
    kind = _kind(chosen.iloc[0])
    for _, row in chosen.iterrows():
        _check_kind(row, kind)
    return Null(kind, tuple(twin_of(row["victim"], row["weights_sha256"], findings_of(row)) for _, row in chosen.iterrows()))


def _kind(row: pandas.Series) -> Kind:
    content = json.loads(row["kind"])
    return Kind(**content | {"classes": tuple(content["classes"])})


def _check_kind(row: pandas.Series, kind: Kind) -> None:
    if differ := kind.others(_kind(row)):
        raise ValueError(f"{row['victim']} is of another kind than the twins of the zoo: {'; '.join(differ)}")


def verdicts(rows: pandas.DataFrame) -> pandas.DataFrame:
    """What the test says of each model, a twin of the null beside the others.

    Args:
        rows: The content of a zoo's ``results.parquet``.

    Returns:
        As `read`; with ``p: S`` of each signal, ``farthest: S``, its x, and ``beside: S``, the class that stands out of the
        twins, NaN or None where it could not be compared; the same of ``all together``, whose p raises the ``alarm`` at 0.05;
        ``twins``, how many it is from, and ``signals``, of which. Empty where there are no twins to compare with.

    Raises:
        ValueError: Models are of different kinds, a suspect has the weights of a twin, or see `Null`.
    """
    found, done = [], read(rows)
    for _, group in done.groupby(KEY, sort=False) if len(done) else ():
        if (null := null_of(group)) is None:
            continue
        found += [_verdict(row, null) for _, row in group.iterrows()]
    return pandas.DataFrame(found)


def _verdict(row: pandas.Series, null: Null) -> dict[str, Any]:
    _check_kind(row, null.kind)
    others = tuple(twin for twin in null.twins if twin.name != row["victim"])
    if same := [twin.name for twin in others if twin.weights_sha256 == row["weights_sha256"]]:
        raise ValueError(f"{row['victim']} has the weights of {same[0]}: a model cannot be compared with itself")
    said = Suspicion(findings_of(row), Null(null.kind, others), ALARM_AT)
    names, p_values = said.compared, said.p_values
    one = row.to_dict() | {"twins": len(others), "signals": json.dumps(sorted(names)), "alarm": said.verdict.alarm}
    for name in [*said.findings, TOGETHER]:
        one |= {f"p: {name}": math.nan, f"farthest: {name}": math.nan, f"beside: {name}": None}
    for name, z in zip(names, said.class_z, strict=True) if names else ():
        one |= _standing(name, p_values[name], z, null.kind)
    return one | (_standing(TOGETHER, said.p, said.class_z.sum(0), null.kind) if names else {})


def _standing(name: str, p: float, z: np.ndarray, kind: Kind) -> dict[str, Any]:
    """The columns of one signal, or of all together, from its z of each class, (K,)."""
    return {f"p: {name}": p, f"farthest: {name}": float(z.max()), f"beside: {name}": kind.classes[int(z.argmax())]}


def of_half(found: pandas.DataFrame, half: str) -> pandas.DataFrame:
    """The rows of one half, ``calibrate`` or ``judge``, of a table that may be empty."""
    return found[found["half"] == half] if len(found) else found


def auroc(frame: pandas.DataFrame, score: str) -> float:
    """Area under the ROC of a column that is higher where a backdoor is suspected; NaN without both sorts of models.

    Those without the score, and those planted in vain, are left out.
    """
    from sklearn.metrics import roc_auc_score

    chosen = frame[frame["state"].isin([BACKDOORED, TRUSTED])].dropna(subset=[score])
    if chosen["state"].nunique() < 2:
        return math.nan
    return float(roc_auc_score(chosen["state"] == BACKDOORED, chosen[score]))


def alarm_rate(found: pandas.DataFrame, state: str, signal: str = TOGETHER) -> Proportion | None:
    """The share of models of a state with p at most 0.05; of those with a p. None where there are none."""
    p = found.loc[found["state"] == state, f"p: {signal}"].dropna()
    return Proportion(int((p <= ALARM_AT).sum()), len(p)) if len(p) else None


def target_rate(found: pandas.DataFrame, signal: str = TOGETHER) -> Proportion | None:
    """Of how many models with a backdoor to one class that class stands out; with an alarm or without. None of no models."""
    chosen = found[(found["state"] == BACKDOORED) & found["target"].notna() & found[f"beside: {signal}"].notna()]
    return Proportion(int((chosen[f"beside: {signal}"] == chosen["target"]).sum()), len(chosen)) if len(chosen) else None


def correlation(found: pandas.DataFrame, score: str) -> float:
    """Spearman's rank correlation of a column with the ASR, over all models in which a backdoor was planted, in vain or not.

    NaN where there are fewer than three, or all have the same.
    """
    chosen = found[found["state"] != TRUSTED].dropna(subset=[score, "asr"])
    if len(chosen) < 3 or chosen[score].nunique() < 2 or chosen["asr"].nunique() < 2:
        return math.nan
    return float(spearmanr(chosen[score], chosen["asr"]).statistic)


def measured(found: pandas.DataFrame) -> list[MeasuredRates]:
    """The rates of the test by all signals on the half `judge`, for `check` to look up: of each set of images.

    Left out are those that were not made by the same signals throughout, those without both sorts of models, and those of too
    few twins for an alarm. Of several seeds `check` takes the first.
    """
    rates, found = [], of_half(found, JUDGE)
    for _, group in found.groupby(KEY, sort=False) if len(found) else ():
        hits, false_alarms = alarm_rate(group, BACKDOORED), alarm_rate(group, TRUSTED)
        kind, first = _kind(group.iloc[0]), group.iloc[0]
        if group["signals"].nunique() > 1 or first["twins"] < twins_needed(ALARM_AT) or hits is None or false_alarms is None:
            continue
        counts = (hits.n, hits.successes, false_alarms.n, false_alarms.successes)
        signals = tuple(json.loads(first["signals"]))
        test = (kind.architecture, len(kind.classes), signals, ALARM_AT, int(first["twins"]), kind.images)
        rates.append(MeasuredRates(*test, *counts))
    return rates
