"""What rules choose from the rows of a study, and how far that is from the best that could be chosen; from the rows alone.

A ladder is all recipes on one victim, retain set and seed. A rule is a score that decides (`thoroughness.SCORES`), from the
whole ladder or from what a walk within the budget tries of it, without the early stop. A rule sees `Tried` and nothing else;
the rates on test images are looked up for what it chose.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas
from scipy.stats import spearmanr

from ..auto.choose import Tried, choose, walked
from ..auto.thoroughness import SCORES
from ..publishing.tables import markdown_table
from .tables import UNKNOWN, UNTOUCHED, framed, split

KEY = ["victim", "retain", "seed"]
SHOWN = {"ACC": "accuracy_after", "ASR": "asr_after", "RA": "ra_after"}
RULES = {f"{score}{scope}": (score, bool(scope)) for scope in ("", ", walk") for score in SCORES}  # the score; whether it walks

LEGEND = (
    "A rule takes the recipe with the highest score of those above the floor, or with `walk` of those that a walk within the "
    "budget tries. Oracle: the lowest ASR above the floor. Regret: ASR of the choice less that of the oracle, in points. Rank "
    "correlation: Spearman's, of a score with ASR over the recipes of a ladder; -1 is best. All rates are of test images, "
    "which no rule sees."
)


@dataclass(frozen=True, eq=False)
class Ladder:
    """All recipes on one victim, retain set and seed.

    Attributes:
        tried: What the rules see, from gentle to severe; without the recipes that could not be tried.
        truth: Rows by the recipes' names, for `SHOWN`.
        start: Where a walk begins.
        budget: Recipes that it tries at most.
        max_accuracy_drop: The floor.
    """

    tried: list[Tried]
    truth: dict[str, Any]
    start: int
    budget: int
    max_accuracy_drop: float

    @property
    def walk(self) -> list[Tried]:
        """Those that a walk tries."""
        by_place = {one.place: one for one in self.tried}
        places = walked(self.start, self.budget, by_place, lambda place: by_place[place].holds(self.max_accuracy_drop))
        return [by_place[place] for place in places]

    def asr(self, name: str) -> float:
        """ASR of the model that a recipe made, in [0, 1]."""
        return float(self.truth[name]["asr_after"])

    def oracle(self) -> str | None:
        """The recipe of the lowest ASR above the floor, of equal ones that of the highest ACC; None where none is above."""
        above = [one.name for one in self.tried if one.holds(self.max_accuracy_drop)]
        return min(above, key=lambda name: (self.asr(name), -self.truth[name]["accuracy_after"]), default=None)

    def correlation(self, score: str) -> float:
        """Spearman's rank correlation of a score with ASR over the recipes that ran, -1 the best; NaN where it is undefined."""
        ran = [one for one in self.tried if score in (one.scores or {})]
        scores, rates = [one.scores[score] for one in ran], [self.asr(one.name) for one in ran]
        if len(set(scores)) < 2 or len(set(rates)) < 2:
            return math.nan
        return float(spearmanr(scores, rates).statistic)


def ladders(rows: pandas.DataFrame) -> Iterator[tuple[tuple[str, str, int], Ladder]]:
    """(victim, retain set, seed) and its ladder, for those of which all cells are made."""
    done = _recipes(rows)
    for key, group in done.groupby(KEY, sort=False) if len(done) else ():
        if len(group) < group["recipes"].iloc[0]:
            continue
        group = group.sort_values("place")
        tried = [_placed(row) for _, row in group[group["tried"].notna()].iterrows()] if "tried" in group else []
        starts, placed = group.loc[group["is_start"].astype(bool), "place"], {one.place for one in tried}
        could = [place for place in starts if place in placed]  # as `Plan.begin` has it
        start = int(could[-1] if could else starts.iloc[0] if len(starts) else 1)
        truth = group.set_index("defence").to_dict("index")
        yield key, Ladder(tried, truth, start, int(group["auto_budget"].iloc[0]), float(group["max_accuracy_drop"].iloc[0]))


def _recipes(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of recipes that were tried or left out: neither failed nor of an untouched model."""
    done, _ = split(rows)
    return done[~done["defence"].isin(UNTOUCHED)] if len(done) else done


def _placed(row: pandas.Series) -> Tried:
    """What was found, at its place on the ladder as that is now."""
    found, place = Tried.from_json(json.loads(row["tried"])), int(row["place"])
    return replace(found, place=place, scores=found.scores and {**found.scores, "place": float(place)})


def choices(rows: pandas.DataFrame) -> pandas.DataFrame:
    """What each of `RULES` chooses on each ladder.

    Args:
        rows: The content of a study's ``results.parquet``.

    Returns:
        Per ladder and rule ``recipe``, whether it is ``above_floor``, and its rates of `SHOWN`; the same of the ``oracle``;
        ``regret``, the difference of their ASR; the ``correlation`` of the rule's score; ``tried``, how many recipes the rule
        looked at, and their ``seconds``. Missing are an oracle where no recipe is above the floor, and a choice where none of
        those looked at ran. Ladders of which no recipe ran are not there.
    """
    found = []
    nothing = {"recipe": None, "above_floor": False, "regret": math.nan} | dict.fromkeys(SHOWN.values(), math.nan)
    for key, ladder in ladders(rows):
        if not any(one.pair for one in ladder.tried):
            continue
        oracle = ladder.oracle()
        best = {f"oracle_{rate}": ladder.truth[oracle][rate] if oracle else math.nan for rate in SHOWN.values()}
        for rule, (score, walks) in RULES.items():
            seen = ladder.walk if walks else ladder.tried
            row = dict(zip(KEY, key, strict=True)) | {"rule": rule, "tried": len(seen), "seconds": sum(t.seconds for t in seen)}
            row |= {"oracle": oracle} | best | {"correlation": ladder.correlation(score)} | nothing
            if any(one.pair for one in seen):
                chosen, is_above = choose(seen, ladder.max_accuracy_drop, score)
                row |= {"recipe": chosen.name, "above_floor": is_above}
                row |= {rate: ladder.truth[chosen.name][rate] for rate in SHOWN.values()}
                row |= {"regret": row["asr_after"] - row["oracle_asr_after"]}
            found.append(row)
    return pandas.DataFrame(found)


def render_study(rows: pandas.DataFrame) -> str:
    """The tables of a study: the rules, the ladders, the recipes, the cells that failed.

    Args:
        rows: The content of its ``results.parquet``.

    Returns:
        Markdown; rates in percent, regret in points.
    """
    return framed(rows, lambda _: _of_study(rows), "study", "; a ladder is shown when all of its cells are made")


def _of_study(rows: pandas.DataFrame) -> Iterator[str]:
    if len(found := choices(rows)):
        yield from ["## Rules", LEGEND, rules_table(found), "## Ladders", ladders_table(found, rows)]
    if len(_recipes(rows)):
        yield from ["## Recipes", recipes_table(rows)]


def rules_table(found: pandas.DataFrame) -> str:
    """One line per rule: mean rates of what it chose, regret, and the mean rank correlation of its score with ASR."""
    lines = []
    for rule in RULES:
        of_rule = found[found["rule"] == rule]
        chosen = of_rule.dropna(subset=["recipe"])
        above = f"{int(chosen['above_floor'].sum())} of {len(of_rule)}"
        rates = _joined(chosen[list(SHOWN.values())].mean())
        regret = [_points(chosen["regret"].mean()), _points(chosen["regret"].max())]
        rho, tried = of_rule["correlation"].mean(), of_rule["tried"].mean()
        lines.append([rule, above, rates, *regret, UNKNOWN if math.isnan(rho) else f"{rho:.2f}", f"{tried:.1f}"])
    head = ["rule", "above the floor", " / ".join(SHOWN), "mean regret", "worst", "rank correlation with ASR", "recipes tried"]
    return markdown_table(head, lines)


def ladders_table(found: pandas.DataFrame, rows: pandas.DataFrame) -> str:
    """One line per ladder: the victim before, what each rule chose with its regret, and the oracle."""
    before = rows[rows["defence"] == UNTOUCHED[0]].drop_duplicates("victim").set_index("victim")
    lines = []
    for key, group in found.groupby(KEY, sort=False):
        by_rule = group.set_index("rule")
        untouched = _joined(before.loc[key[0]]) if key[0] in before.index else ""
        shown = [_choice(by_rule.loc[rule]) for rule in RULES]
        oracle = by_rule.iloc[0]
        is_there = isinstance(oracle["oracle"], str)
        best = f"{oracle['oracle']}: {_joined(oracle, 'oracle_')}" if is_there else "none above the floor"
        lines.append([key[0], str(key[1]), f"{key[2]:.0f}", untouched, *shown, best])
    return markdown_table([*KEY, f"before: {' / '.join(SHOWN)}", *RULES, "oracle"], lines)


def _choice(row: pandas.Series) -> str:
    if not isinstance(row["recipe"], str):
        return "none ran"
    floor = "" if row["above_floor"] else " below the floor"
    return f"{row['recipe']}{floor}: {_joined(row)} (+{_points(row['regret'])})"


def recipes_table(rows: pandas.DataFrame) -> str:
    """One line per recipe in the ladder's order: how often it was tried and kept the floor, mean rates, the highest ASR."""
    lines, done = [], _recipes(rows).sort_values("place", kind="stable")
    for name, group in done.groupby("defence", sort=False):
        tried = [_placed(row) for _, row in group[group["tried"].notna()].iterrows()] if "tried" in group else []
        kept = sum(one.holds(group["max_accuracy_drop"].iloc[0]) for one in tried)
        rates = group.reindex(columns=list(SHOWN.values())).dropna()
        mean, worst = (_joined(rates.mean()), f"{100 * rates['asr_after'].max():.1f}") if len(rates) else ("", "")
        lines.append([name, f"{kept} of {len(tried)}", str(len(group) - len(tried)), mean, worst])
    return markdown_table(["recipe", "kept the floor", "left out", " / ".join(SHOWN), "highest ASR"], lines)


def _joined(rates: pandas.Series, prefix: str = "") -> str:
    """``90.1 / 2.3 / 88.0``."""
    return " / ".join(_points(rates[f"{prefix}{rate}"]) for rate in SHOWN.values())


def _points(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{100 * value:.1f}"
