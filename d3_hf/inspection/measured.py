"""How often exactly this test was right about models of a kind, as far as that was measured: a file beside this one.

A zoo (`d3_hf.zoo`) writes such a file beside its tables. Rates are looked up by what they hold for: the network, the number
of classes, the signals that make p, and the p of an alarm. Twins and images of a check may be others: theirs are said too.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..evaluation.metrics import Proportion
from ..files import atomic_file, read_mapping
from .null import Kind

SCHEMA = "urn:d3_hf:measured:2"
FILE = Path(__file__).with_name("measured.json")
ADVICE = "write it with recipes/assurance_study.py"


@dataclass(frozen=True)
class MeasuredRates:
    """What a zoo says of one kind of models.

    Args:
        architecture: Of the kind, see `Kind`.
        classes: How many.
        signals: Those that made p, sorted.
        alarm_at: There was an alarm where p was at most this.
        twins: How many the p was from.
        images: How many were looked at.
        backdoored: Models with a backdoor.
        hits: Of these, those with an alarm.
        trusted: Models without one.
        false_alarms: Of these, those with an alarm.

    Raises:
        ValueError: There are no models with or none without a backdoor, or more alarms than models.
    """

    architecture: str
    classes: int
    signals: tuple[str, ...]
    alarm_at: float
    twins: int
    images: int
    backdoored: int
    hits: int
    trusted: int
    false_alarms: int

    def __post_init__(self) -> None:
        for hits, models in ((self.hits, self.backdoored), (self.false_alarms, self.trusted)):
            Proportion(hits, models)

    def holds_for(self, kind: Kind, signals: Iterable[str], alarm_at: float) -> bool:
        """Whether a check of such a model, by these signals, is the test that was measured."""
        same = (self.architecture, self.classes) == (kind.architecture, len(kind.classes))
        return same and (self.signals, self.alarm_at) == (tuple(sorted(signals)), alarm_at)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, as ``check.schema.json`` describes it: ``hit_rate`` and ``false_alarm_rate`` are proportions."""
        found = {name: getattr(self, name) for name in ("architecture", "classes", "alarm_at", "twins", "images")}
        found |= {"signals": list(self.signals)} | Proportion(self.hits, self.backdoored).as_dict("hit_rate")
        return found | Proportion(self.false_alarms, self.trusted).as_dict("false_alarm_rate")


def measured_rates(kind: Kind, signals: Iterable[str], alarm_at: float) -> MeasuredRates | None:
    """The rates of the test by these signals on models of this kind; None where they were not measured.

    Raises:
        ValueError: The file of the package is damaged.
    """
    names = list(signals)
    known = read_measured(FILE) if FILE.is_file() else ()
    return next((one for one in known if one.holds_for(kind, names, alarm_at)), None)


def read_measured(file: Path) -> tuple[MeasuredRates, ...]:
    """Read what `write_measured` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or of another version.
    """
    found = read_mapping(file, "file of measured rates", ADVICE, {"schema": None, "kinds": None})
    if found["schema"] != SCHEMA:
        raise ValueError(f"{file} is no file of measured rates of this version ({SCHEMA}): {ADVICE}")
    try:
        names = [field.name for field in fields(MeasuredRates)]
        entries = [{name: entry[name] for name in names} for entry in found["kinds"]]
        return tuple(MeasuredRates(**entry | {"signals": tuple(entry["signals"])}) for entry in entries)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is no file of measured rates ({error}): {ADVICE}") from error


def write_measured(rates: Iterable[MeasuredRates], file: Path) -> None:
    """Write it as JSON; the file appears whole or not at all."""
    with atomic_file(file) as beside:
        content = {"schema": SCHEMA, "kinds": [asdict(one) for one in rates]}
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
