"""The folder of a purified model: what is written into it."""

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from ..files import first_line
from ..models.shared import state_to_save
from . import hub
from .card import render_card
from .manifest import MANIFEST, RESULTS, RETAIN_INDICES
from .pictures.of_card import Picture, pictures_of

logger = logging.getLogger(__name__)


def write_purified(run: Any, folder: Path, state_dict: dict | None = None) -> None:
    """Write weights, configuration, processor, the method's own files, retain rows, results and manifest.

    Args:
        run: A `PurifyTrainer`.
        folder: Where to.
        state_dict: Weights in place of the model's own.
    """
    # The Trainer's own would add training_args.bin, a pickle that can hold a token.
    run.plain.save_pretrained(folder, state_dict=state_to_save(run.plain, state_dict))
    # timm's is in config.json; its save_pretrained does nothing but warn, which reads as if the model were not saved.
    if not isinstance(run.processing_class, TimmWrapperImageProcessor):
        run.processing_class.save_pretrained(folder)
    run.write_own_files(folder)
    if run.retain_indices is not None:
        (folder / RETAIN_INDICES).write_text(json.dumps(run.retain_indices) + "\n")
    if run.report.results:
        (folder / RESULTS).write_text(json.dumps(run.report.results, indent=2) + "\n")
    (folder / run.manifest_name).write_text(json.dumps(run.facts(), indent=2) + "\n")


def card_of(run: Any, model_name: str | None = None) -> ModelCard:
    """The card of a `PurifyTrainer`'s model, named after its repository if ``model_name`` is None."""
    name = model_name or hub.repository(run.args).rpartition("/")[2]
    place = run.args.hub_model_id or ""  # to load from; where the namespace is missing the push puts it in
    licence = run.card_details.licence() or run.source_licence
    pictures = {picture.name: picture.caption for picture in pictures_in(run)}
    return render_card(run.facts(), run.report.results or None, name, place if "/" in place else None, licence, pictures)


def pictures_in(run: Any) -> list[Picture]:
    """The pictures of a `PurifyTrainer`'s card, to be drawn beside it; of a victim's none."""
    if run.manifest_name != MANIFEST:
        return []
    found = pictures_of(run.report, run.state.log_history, getattr(run.args, "epsilon", None))
    return [picture for picture in found if picture.name not in run.undrawn]


def draw_pictures(run: Any, folder: Path) -> None:
    """Draw them into a folder; one that cannot be drawn is logged and left out of the card: it is no reason to lose a run.

    Raises:
        OSError: The disk is full or failing.
    """
    for picture in pictures_in(run):
        try:
            picture.draw(folder / picture.name)
        except OSError:
            raise
        except Exception as error:  # fonts, pixels, another version of matplotlib
            logger.warning("%s is not drawn (%s)", picture.name, first_line(error))
            (folder / picture.name).unlink(missing_ok=True)
            run.undrawn |= {picture.name}
