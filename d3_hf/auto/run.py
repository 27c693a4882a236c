"""Walking the ladder: try recipes on copies of the suspicious model, choose one, say how.

Nothing here knows a trigger or a test image: the model and the retain set come in, a recipe comes out. Who calls it trains the
suspicious model itself by that recipe and measures it, as for any ``--defence``.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list

from ..evaluation.metrics import accuracy
from ..publishing.names import public_name
from ..training.phases import PURIFICATION, Phases
from .choose import Tried, choose
from .floor import STANDARD_ERRORS
from .plan import Plan, Rung, as_text
from .record import RECORD, Record
from .thoroughness import RULE, SCORES
from .trial import Refused, predictions_before, try_recipe


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        rung: The recipe.
        facts: How it was chosen, JSON-able, for manifest and card.
    """

    rung: Rung
    facts: dict[str, Any]


def choose_recipe(plan: Plan, phases: Phases | None = None) -> Choice:
    """Walk the ladder within the budget and choose; called by all processes.

    What was tried is in `record.RECORD` in ``output_dir`` as soon as it is known, and not tried again by the same run.

    Args:
        plan: The plan.
        phases: Those of the run that this is a part of; None: it begins with this and ends with a purification.

    Raises:
        KeyboardInterrupt: It was interrupted; the message says how to go on.
        RuntimeError: No recipe ran through.
        ValueError: See `Record` and `predictions_before`.
    """
    budget = plan.args.auto_budget
    walk = _Walk(plan, phases or Phases(1 + budget + PURIFICATION))
    while len(walk.tried) < budget and (rung := walk.next_rung()) is not None:
        left = walk.left(rung, budget - len(walk.tried))
        walk.phases.begin(f"trying {rung.recipe.name}{left}", walk.first + 1 + len(walk.tried))
        walk.try_it(rung)
    tried, is_above = choose(list(walk.tried.values()), plan.max_accuracy_drop, RULE)
    rung = plan.available[tried.place]
    kept = "the most thorough above the floor" if is_above else "the gentlest, since none kept the floor"
    walk.say(f"chosen: {tried.name}, {kept}; it purifies on {len(plan.split.retained)} images{walk.left(rung, 0)}")
    walk.phases.number = walk.first + budget  # trials that were not needed are passed over
    return Choice(rung, _facts(plan, walk, tried, is_above))


class _Walk:
    def __init__(self, plan: Plan, phases: Phases):
        self.plan, self.tried, self.phases = plan, dict[int, Tried](), phases
        self.is_main = plan.args.process_index == 0
        self.record = Record(plan) if self.is_main else None
        self.say(as_text(plan))
        phases.begin(f"looking at the suspicious model on {len(plan.split.retained)} images")
        self.first = phases.number
        self.before = predictions_before(plan, progress=self.is_main)

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def left(self, rung: Rung, trials: int) -> str:
        """`` (about 3 minutes left)``; see `seconds_left` for the trials of a rung that are still to come."""
        seconds = seconds_left(self.tried.values(), rung, trials)
        return "" if seconds is None else f" ({minutes_said(seconds)} left)"

    def next_rung(self) -> Rung | None:
        return self.plan.next_rung({place: tried.holds(self.plan.max_accuracy_drop) for place, tried in self.tried.items()})

    def try_it(self, rung: Rung) -> None:
        (found,) = broadcast_object_list([self.record.get(rung) if self.record else None])
        if found is None:
            try:
                found = try_recipe(self.plan, rung, self.before)
            except Refused as reason:
                self.plan.left_out[rung.recipe.name] = str(reason)
                self.say(f"    left out: {reason}")
                return
            except KeyboardInterrupt as stop:
                file = f"{self.plan.args.output_dir}/{RECORD}"
                raise type(stop)(
                    f"while trying {rung.recipe.name}: what was tried before it stays in {file}; run the same command again"
                ) from None
            (found,) = broadcast_object_list([found])
            if self.record:
                self.record.put(rung, found)
        self.tried[rung.place] = found
        self.say(f"    {_outcome(found, self.plan.max_accuracy_drop)}")


def seconds_left(tried: Collection[Tried], rung: Rung, trials: int) -> float | None:
    """Seconds of so many trials like a rung's and of the purification by it, at the pace of what was tried.

    Returns:
        None where nothing was tried yet that says how long an update takes. Measuring on test images is not in it.
    """
    ran = [one for one in tried if one.updates]
    if not ran:
        return None
    pace = sum(one.seconds for one in ran) / sum(one.updates for one in ran)
    return pace * (trials * rung.updates + rung.final_updates)


def minutes_said(seconds: float) -> str:
    """Seconds in whole minutes, in words."""
    minutes = round(seconds / 60)
    return "less than a minute" if minutes < 1 else f"about {minutes} minute{'s' if minutes > 1 else ''}"


def _outcome(tried: Tried, max_accuracy_drop: float) -> str:
    if tried.pair is None:
        return f"broken: {tried.error}"
    pair = tried.pair
    said = f"validation ACC {100 * pair.before.value:.1f} -> {100 * pair.after.value:.1f} % ({pair.n} images), floor "
    if tried.stopped_at:
        return f"{said}broken: stopped at {100 * tried.stopped_at:g} % of its updates"
    return said + ("kept" if tried.holds(max_accuracy_drop) else "broken")


def _facts(plan: Plan, walk: _Walk, chosen: Tried, is_above: bool) -> dict[str, Any]:
    rows = []
    for tried in walk.tried.values():
        rung = plan.available[tried.place]
        pair = tried.pair
        row = rung.described() | {"seconds": tried.seconds, "floor": "raised"}
        if pair is None:
            row |= {"error": _published(tried.error, plan)}
        else:
            row |= pair.after.as_dict("accuracy") | {"lost": pair.lost, "gained": pair.gained}
            row |= {"floor": "kept" if tried.holds(plan.max_accuracy_drop) else "broken", "scores": tried.scores}
            row |= {"stopped_at": tried.stopped_at} if tried.stopped_at else {"updates": tried.updates}
        rows.append(row)
    return {
        "recipe": chosen.name,
        "above_floor": is_above,
        "rule": (
            f"Of the recipes tried whose validation ACC fell by at most {100 * plan.max_accuracy_drop:g} points less "
            f"{STANDARD_ERRORS:g} standard error of the paired difference, the one {SCORES[RULE]}; where there is none, the "
            "gentlest."
        ),
        "score": RULE,
        "max_accuracy_drop": plan.max_accuracy_drop,
        "split": plan.split.counts(),
        "audit_rows": plan.images.index[plan.split.audit].tolist(),
        **accuracy(walk.before, plan.validation.labels).as_dict("accuracy_before"),
        "tried": rows,
        "left_out": {name: _published(why, plan) for name, why in plan.left_out.items()},
    }


def _published(text: str, plan: Plan) -> str:
    """What an error said, without the path of a base, which stays on this machine."""
    base = plan.args.base_model
    return text.replace(base, public_name(base)) if base else text
