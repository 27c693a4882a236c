"""What a trainer leaves for others to read: the model's files, the manifest, the card, the push of all of them."""

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, ModelCard
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from ..data import retain as inputs
from ..data.streaming import StreamedImages
from ..data.training_images import TrainingImages
from ..publishing import hub, manifest
from ..publishing.card import render_card
from ..publishing.manifest import RETAIN_INDICES
from .distillation import Teacher
from .durable import DurableTrainer

if TYPE_CHECKING:
    from ..data.preprocessing import Preprocessing
    from .averaging import WeightAverage


class PublishingTrainer(DurableTrainer):
    """A `DurableTrainer` of a purified model: what its files hold, and that nothing else goes up. `PurifyTrainer` trains."""

    method: str
    paper: str | None
    preprocessing: "Preprocessing"
    retain_indices: list[int] | None
    data_source: str | None
    measured: dict[str, Any]
    results: dict[str, Any] | None
    distiller: Teacher | None
    average: "WeightAverage | None"

    @functools.cached_property
    def source_checks(self) -> dict[str, Any] | None:  # asked once
        """See `hub.source_checks`."""
        source = getattr(self.plain, "source", None)
        return hub.source_checks(asdict(source)) if source else None

    @functools.cached_property
    def _retain_sha256(self) -> str:  # the images stay as they are
        return self.train_dataset.fingerprint()

    def facts(self) -> dict[str, Any]:
        """The manifest: everything needed to repeat the run and all that the card says of it; JSON-able."""
        retain = {"n": inputs.images_of(self), "source": self.data_source and manifest.public_name(self.data_source)}
        if self.data_source and manifest.is_local(self.data_source) and isinstance(self.train_dataset, TrainingImages):
            retain["sha256"] = self._retain_sha256  # a last name alone says little
        if isinstance(self.train_dataset, StreamedImages):
            retain["streamed"] = True
        if self.retain_indices is not None:
            retain["indices_file"] = RETAIN_INDICES
        preprocessing = self.preprocessing
        added = {Teacher.KEY: self.distiller.sha256} if self.distiller else {}
        added |= {"averaged_epochs": self.average.snapshots} if self.average else {}
        added |= {"source_checks": checks} if (checks := self.source_checks) else {}
        return added | {
            "method": self.method,
            "paper": self.paper,
            "source": manifest.source_of(self.plain),
            "retain": retain,
            "preprocessing": {"size": preprocessing.size, "mean": preprocessing.mean, "std": preprocessing.std},
            "batch_norm": self.args.batch_norm if self._batch_norms else "none in this model",
            "arguments": manifest.arguments_of(self.args),
            "steps": self.state.global_step,
            "measured": self.measured,
            "versions": manifest.versions(),
        }

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Write the model and what belongs to it into a folder; manifest and card follow. Override to add files."""
        # The Trainer's own would add training_args.bin, a pickle that can hold a token.
        self.plain.save_pretrained(folder, state_dict=state_dict)
        # timm's is in config.json; its save_pretrained does nothing but warn, which reads as if the model were not saved.
        if not isinstance(self.processing_class, TimmWrapperImageProcessor):
            self.processing_class.save_pretrained(folder)
        if self.retain_indices is not None:
            (folder / RETAIN_INDICES).write_text(json.dumps(self.retain_indices) + "\n")
        if self.results:
            (folder / "all_results.json").write_text(json.dumps(self.results, indent=2) + "\n")

    def card(self, model_name: str | None = None) -> ModelCard:
        """The model card, from the manifest and, if `purify` measured, the results."""
        name = model_name or hub.repository(self.args).rpartition("/")[2]
        place = self.args.hub_model_id or ""  # to load from; where the namespace is missing the push puts it in
        return render_card(self.facts(), self.results, name, place if "/" in place else None)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Say at the start what would stop the push; the repository is made when there is something to put into it."""
        hub.check_push(self.args, manifest.source_of(self.model), self.manifest_name)

    def push_to_hub(self, commit_message: str = "Purified model", revision: str | None = None) -> CommitInfo | None:
        """Save, then push what was saved; see `hub.push_folder`. None on all but the main process."""
        self.init_hf_repo()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        args, repo = self.args, None if self.args.hub_create_pr else hub.repository(self.args)
        options = dict(private=args.hub_private_repo is not False, create_pr=args.hub_create_pr, revision=revision)
        return hub.push_folder(args.output_dir, repo, message=commit_message, **options)
