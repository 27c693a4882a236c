"""What a trainer publishes: manifest, card and push, with the arguments that `Trainer`'s own methods take."""

import functools
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard

from ..files import atomic_file
from ..models.kinds import model_kind
from ..models.source import source_of
from ..publishing import hub, manifest
from ..publishing.details import CardDetails
from ..publishing.folder import card_of, draw_pictures, write_purified
from ..publishing.readme import source_licence
from ..publishing.report import Report
from .checkpoints import check_not_source
from .durable import DurableTrainer

MESSAGE = "Purified model"  # of a commit


class PublishingTrainer(DurableTrainer):
    """The part of `PurifyTrainer` that writes what others read.

    Attributes:
        report: What is known of the run besides, see `record`.
        card_details: What is said of the model beyond its manifest.
        undrawn: Names of the card's pictures that could not be drawn.
    """

    last_file = manifest_name = manifest.MANIFEST
    replaced_files = manifest.MODEL_FILES

    report: Report = Report()
    card_details: CardDetails = CardDetails()
    undrawn: frozenset[str] = frozenset()

    def record(self, report: Report) -> None:
        """Take in what is known of the run besides: manifest, results and card say it from the next saving on."""
        self.report = report

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Write the model and what belongs to it; the card too, except into checkpoints. Override to add files."""
        write_purified(self, folder, state_dict)
        if not self.is_writing_checkpoint:
            draw_pictures(self, folder)
            self._published_card().save(folder / manifest.CARD)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        check_not_source(Path(output_dir or self.args.output_dir), source_of(self.plain))
        super()._save(output_dir, state_dict)
        if self.args.should_save and not self.is_writing_checkpoint and not self.report.rejected:
            manifest.remove_rejected(Path(output_dir or self.args.output_dir))  # of an earlier run, see `check_output`

    @functools.cached_property
    def source_licence(self) -> dict[str, Any]:  # asked once, for every card
        """The licence of the model that is purified, see `readme.source_licence`."""
        return source_licence(source_of(self.plain), self.card_details.finetuned_from)

    def describe(self, **given: Any) -> None:
        """Let every card written from now on say more, see `CardDetails`, as ``license="mit"``; nothing is written.

        Raises:
            TypeError: A card has no such detail.
            ValueError: It contradicts the run, see `CardDetails.check`.
        """
        details = self.card_details.updated(given)
        kind = model_kind(self.plain)
        details.check(manifest.source_facts(self.plain), bool(self.report.results), kind)
        self.card_details = details

    def card(self, model_name: str | None = None) -> ModelCard:
        """The model card, from the manifest and, if `purify` measured, the results."""
        return card_of(self, model_name)

    def create_model_card(
        self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, tasks=None, dataset_tags=None,
        dataset=None, dataset_args=None,
    ) -> None:  # fmt: skip
        """Write ``README.md``; what it is told goes into every card written from now on, see `CardDetails`."""
        given = dict(language=language, license=license, tags=tags, model_name=model_name, finetuned_from=finetuned_from)
        given |= dict(tasks=tasks, dataset_tags=dataset_tags, dataset=dataset, dataset_args=dataset_args)
        self.describe(**given)
        if self.is_world_process_zero():
            file = Path(self.args.output_dir) / manifest.CARD
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_pictures(self, file.parent)
            with atomic_file(file) as beside:
                beside.write_text(str(self._published_card()), encoding="utf-8")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Say at the start what would stop the push; the repository is made when there is something to put into it."""
        hub.check_push(self.args, manifest.source_facts(self.model), self.manifest_name, token)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save, then push what was saved; see `hub.push_folder`.

        Args:
            commit_message: Default: "Purified model".
            blocking: False returns at once, with a future of the commit.
            token: In place of the one that is logged in.
            revision: Branch. Default: ``hub_revision``.
            private: Whether a new repository is. Default: ``hub_private_repo``.
            kwargs: Of `create_model_card`, as ``tags``.

        Returns:
            The commit, or its future; None on all but the main process.

        Raises:
            ValueError: A guard rail has rejected the model, or see `hub.check_push` and `CardDetails.check`.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.describe(**kwargs)
        self.init_hf_repo(token, private)
        if self.report.rejected:
            raise ValueError(f"the model was rejected and is not pushed ({'; '.join(self.report.rejected)})")
        if args.hub_create_pr and private is not None:
            raise ValueError("private is for a new repository, and hub_create_pr pushes to the source's: leave private out")
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        private = args.hub_private_repo if private is None else private
        upload = functools.partial(
            hub.push_folder,
            args.output_dir,
            None if args.hub_create_pr else hub.repository(args),
            private=private is not False,
            create_pr=args.hub_create_pr,
            revision=revision or args.hub_revision,
            message=commit_message or MESSAGE,
            token=token,
        )
        return upload() if blocking else HfApi().run_as_future(upload)

    def _published_card(self) -> ModelCard:
        details = self.card_details.updated({"tags": self.plain.model_tags})  # with `PreTrainedModel.add_model_tags`
        return details.put_on(self.card(details.model_name))
