"""A grid of encoders: planted ones x defences that need no labels, before and after by probes.

It is a benchmark but for three things. Victims are the folders that ``d3-hf victim --encoder`` wrote, defences those of
`ENCODER_DEFENCES`, and ACC, ASR and RA are those of two probes (`measure_encoder`), trained on the images that the victim's own
probes were trained on. What the victim and the untouched encoder came to when the victim was made, on the same images, stands
in its record, and is not measured again.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from ..data.images import RawImages
from ..defenses import ENCODER_DEFENCES
from ..defenses import defence as load_defence
from ..evaluation.encoders import PROBES, measure_encoder
from ..evaluation.measure import measured_model
from ..models import load_encoder
from ..options.arguments import ProbeArguments
from ..victims.record import check_files
from ..victims.train import images_digest
from .cells import Cell, Runner, made_by, network_of
from .grid import Grid, GridInputs
from .meters import peak_memory, reset_peak_memory
from .tables import UNTOUCHED

RECORDED = dict(zip(("victim", "untouched"), UNTOUCHED, strict=True))  # entry of a record: what the tables call it
RATES = ("accuracy", "asr", "ra", "untriggered")


@dataclass
class EncoderGrid(Grid):
    """A grid whose victims are encoders.

    Args:
        victims: Folders below ``victims_dir`` that ``d3-hf victim --encoder`` wrote.
        defences: Per name ``defence`` (a key of `d3_hf.defenses.ENCODER_DEFENCES`) and options of its Config.
        probe_count: Labelled images that the probes are trained on: the victims' ``probe_count``.

    Raises:
        ValueError: See `Grid`; ``victims`` is no list; a defence is one of classifiers; or ``class_map``,
            ``retain_from_test``, ``watch_images`` or ``save_models`` are given.
    """

    of_encoders: ClassVar[bool] = True
    victims_dir: str = "outputs"
    probe_count: int = 2000

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.victims, dict):
            raise ValueError("victims of a grid of encoders are folders that d3-hf victim --encoder wrote: give a list of them")
        if others := [name for name, options in self.defences.items() if options["defence"] not in ENCODER_DEFENCES]:
            raise ValueError(f"{others[0]} is a defence of classifiers: a grid of encoders takes {', '.join(ENCODER_DEFENCES)}")
        left_out = ("class_map", "retain_from_test", "watch_images", "save_models")
        if given := [name for name in left_out if getattr(self, name)]:
            raise ValueError(f"a grid of encoders has no {given[0]}: leave it out")


class EncoderInputs(GridInputs):
    """The images and encoders of a grid; see `GridInputs`."""

    grid: EncoderGrid

    @cached_property
    def _drawn(self) -> tuple[RawImages, RawImages]:
        return ProbeArguments(self.grid.probe_count).draw(self._images.rest)

    @property
    def probe(self) -> RawImages:
        """Labelled images to train probes on, that neither an attacker nor a defence has seen."""
        return self._drawn[0]

    @cached_property
    def rest_sha256(self) -> str:
        """Digest of the attacker's images."""
        return images_digest(self._drawn[1])

    def _check_unseen(self, folder: Path, record: dict[str, Any]) -> None:
        """Refuse also what is no encoder with a backdoor, and one that other probes or other images measured."""
        if record.get("kind") != "encoder" or not record["planted"]:
            raise ValueError(f"{folder} is no encoder with a backdoor, and has nothing to be purified of")
        recipe, asked = record["recipe"], {"probe_count": self.grid.probe_count, "max_test_images": self.grid.test_images}
        if other := [f"{name} {recipe.get(name)}, here {count}" for name, count in asked.items() if recipe.get(name) != count]:
            raise ValueError(
                f"{folder} was measured on other images than the grid would ({'; '.join(other)}): give the grid the victim's"
            )
        super()._check_unseen(folder, record)

    def model(self, victim: str) -> PreTrainedModel:
        """Load a victim; raises as `GridInputs.model`."""
        folder = Path(self.grid.victims_dir) / victim
        check_files(folder, self.record(victim))
        return load_encoder(str(folder))

    def twin(self, victim: str) -> None:
        """None: a victim's record holds what the untouched encoder came to."""


class EncoderRunner(Runner):
    """Makes the cells of a grid of encoders.

    Args:
        grid: The grid.
    """

    grid: EncoderGrid
    inputs: EncoderInputs
    inputs_class = EncoderInputs

    def spec(self, cell: Cell) -> dict[str, Any]:
        """As the base class, with the images that the probes are trained on."""
        return super().spec(cell) | {"probe_sha256": self._probe_sha256}

    @cached_property
    def _probe_sha256(self) -> str:
        return images_digest(self.inputs.probe)

    def purify(self, cell: Cell) -> dict[str, Any]:
        """Purify the encoder and return what its probes came to, as one flat row."""
        model, attack = self.inputs.model(cell.victim), self.inputs.attack(cell.victim)
        retain, options = self.inputs.retain(cell.retain, cell.seed), self.options(cell)
        config_class, trainer_class = load_defence(options.pop("defence"), of_encoders=True)
        args = config_class(output_dir=str(self.folder(cell)), overwrite_output_dir=True, seed=cell.seed, **options)
        reset_peak_memory()
        started = time.perf_counter()
        trainer = trainer_class(model=model, args=args, train_dataset=retain)
        trainer.train()
        seconds, peak = time.perf_counter() - started, peak_memory()
        preprocessing, size = trainer.preprocessing, args.per_device_eval_batch_size
        found = measure_encoder(
            measured_model(trainer), self.inputs.probe, self.inputs.test, preprocessing, attack, batch_size=size
        )
        last = next((log for log in reversed(trainer.state.log_history) if trainer.log_names[0] in log), {})
        row = asdict(cell) | {"method": trainer.method, "attack": attack.name, "network": network_of(model)}
        row |= {"retain_n": len(retain), "seconds_training": seconds, "peak_memory_mib": peak}
        row |= made_by(trainer, model) | {"updates": trainer.state.global_step}
        return row | {name: last.get(name) for name in trainer.log_names} | flat(found)

    def summary(self, row: dict[str, Any]) -> str:
        """What a cell came to, in a line."""
        shares = {probe: [100 * row[f"{rate}_{probe}"] for rate in RATES[:3]] for probe in PROBES}
        said = [f"{probe} {' / '.join(f'{share:.1f}' for share in found)}" for probe, found in shares.items()]
        return f"ACC / ASR / RA: {', '.join(said)}; {row['seconds_training']:.0f} s"

    def untouched(self, victim: str) -> Iterator[dict[str, Any]]:
        """A row for a victim, and one for the encoder that it was made of or beside, both from its record."""
        measured = self.inputs.record(victim)["measured"]
        for entry, name in RECORDED.items():
            if entry in measured:
                yield {"victim": victim, "defence": name} | flat(measured[entry])


def flat(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`measure_encoder`'s rates as columns ``<rate>_<probe>``, and ``<rate>_<probe>_seeds`` as JSON."""
    return {
        f"{rate}_{probe}{ending}": json.dumps(found[probe][rate + ending]) if ending else found[probe][rate]
        for probe in PROBES
        for rate in RATES
        for ending in ("", "_seeds")
    }
