"""Walking the ladder: try recipes on copies of the suspicious model, choose one, say how; or say what would be tried.

Nothing here knows a trigger or a test image: the model and the retain set come in, a recipe comes out. Who calls it trains the
suspicious model itself by that recipe and measures it, as for any ``--defence``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from ..evaluation.class_order import order_contradiction
from ..evaluation.measure import measure
from ..evaluation.metrics import accuracy
from ..publishing.names import public_name
from .choose import Tried, choose
from .floor import STANDARD_ERRORS
from .plan import Plan, Rung, as_text
from .record import RECORD, Record
from .thoroughness import RULE, SCORES
from .trial import Refused, refusal, seconds_per_update, try_recipe


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        rung: The recipe.
        facts: How it was chosen, JSON-able, for manifest and card.
    """

    rung: Rung
    facts: dict[str, Any]


def choose_recipe(plan: Plan) -> Choice:
    """Walk the ladder within the budget and choose; called by all processes.

    What was tried is in `record.RECORD` in ``output_dir`` as soon as it is known, and not tried again by the same run.

    Raises:
        KeyboardInterrupt: It was interrupted; the message says how to go on.
        RuntimeError: No recipe ran through.
        ValueError: See `Record` and `order_contradiction`.
    """
    walk, budget = _Walk(plan), plan.args.auto_budget
    walk.say(as_text(plan))
    while len(walk.tried) < budget and (rung := walk.next_rung()) is not None:
        walk.say(f"{len(walk.tried) + 1}/{budget + 1} trying {rung.recipe.name}")
        walk.try_it(rung)
    tried, is_above = choose(list(walk.tried.values()), plan.max_accuracy_drop, RULE)
    rung = plan.available[tried.place]
    kept = "the most thorough above the floor" if is_above else "the gentlest, since none kept the floor"
    walk.say(f"{budget + 1}/{budget + 1} purifying by {tried.name} ({kept}) on {len(plan.split.retained)} images")
    return Choice(rung, _facts(plan, walk, tried, is_above))


class _Walk:
    def __init__(self, plan: Plan):
        self.plan, self.tried = plan, dict[int, Tried]()
        self.is_main = plan.args.process_index == 0
        self.record = Record(plan) if self.is_main else None
        self.before = self._before()

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def _before(self) -> np.ndarray:
        """Predictions of the suspicious model for the validation images; classes in another order are refused here already."""
        plan, rows = self.plan, self.plan.split.retained
        images = plan.images.select(rows)
        size, device = plan.args.per_device_eval_batch_size, plan.args.device
        found = measure(plan.model, images, plan.preprocessing, batch_size=size, device=device, progress=self.is_main)
        if said := order_contradiction(found.predictions, images.labels, images.class_names, plan.model.config):
            raise ValueError(said)
        return found.predictions[np.isin(rows, plan.split.validate)]

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


def _outcome(tried: Tried, max_accuracy_drop: float) -> str:
    if tried.pair is None:
        return f"broken: {tried.error}"
    floor = "kept" if tried.holds(max_accuracy_drop) else "broken"
    pair = tried.pair
    return f"validation ACC {100 * pair.before.value:.1f} -> {100 * pair.after.value:.1f} % ({pair.n} images), floor {floor}"


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
            row |= {"updates": tried.updates}
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


def dry_run(plan: Plan) -> dict[str, Any]:
    """Print the plan and about how long it would take; some updates of the first recipe are timed, nothing is written.

    Returns:
        `Plan.described`, and ``minutes``: as if the whole budget were tried and each update took as long as those of the first
        recipe; None where that has too few updates to tell.
    """
    for rung in plan.rungs:
        if why := refusal(plan, rung):
            plan.left_out[rung.recipe.name] = why
    first = plan.next_rung({})
    seconds = seconds_per_update(plan, first)
    tried = min(plan.args.auto_budget, len(plan.available))
    minutes = seconds and seconds * (tried * first.updates + first.final_updates) / 60
    if plan.args.process_index == 0:
        print(as_text(plan))
        if minutes is not None:
            print(
                f"about {minutes:.1f} minutes: {tried} trials and the purification, at {seconds:.3g} s an update as timed on "
                f"{first.recipe.name}; fewer if the ladder ends sooner"
            )
    return plan.described() | {"minutes": minutes}
