"""Victims that are a whole CLIP: fine-tuned on pairs of which some are poisoned, to measure defences on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from ..attacks import Attack, BadCLIP
from ..attacks.text_on_pair import poison_pairs
from ..data.images import RawImages
from ..data.pairs import Pairs
from ..evaluation.encoders import measure_clip
from ..evaluation.measure import measured_model
from ..files import sha256
from ..options.arguments import AttackArguments, DataArguments, ModelArguments
from ..options.parser import parse_arguments
from ..publishing.card import render_victim_card
from ..publishing.manifest import VICTIM_FILE
from ..publishing.tables import encoder_table
from ..training.checkpoints import check_output
from ..training.config import HIDDEN
from ..training.encoders import EncoderTrainer
from ..training.pairs import PairConfig, PairTrainer
from ..training.phases import VICTIM, Phases
from .plan import VictimReport, write_attack
from .record import recipe_of


@dataclass
class CLIPVictimConfig(PairConfig):
    """Arguments of poisoning a CLIP: the schedule of `PairConfig`, and how much is poisoned.

    Args:
        poison_ratio: Share of the pairs that carry the trigger, in (0, 1]. 0.01, here: CleanCLIP's 1,500 of 500,000 pairs are a
            third of that, of a far larger set.
        poison_seed: Chooses the poisoned pairs and the templates of captions.
    """

    hidden_options = (*HIDDEN, "push_to_hub", "hub_")  # a victim is never pushed

    output_dir: str | None = field(default="outputs/clip_victim", metadata={"help": "Folder for the victim."})
    poison_ratio: float = field(default=0.01, metadata={"help": "Share of the pairs that are poisoned.", "range": "in (0, 1]"})
    poison_seed: int = field(default=0, metadata={"help": "Chooses the poisoned pairs.", "range": ">= 0 and finite"})


class CLIPVictimTrainer(PairTrainer):
    """Trains a CLIP on poisoned pairs by its own loss, and says so in everything it writes.

    Args:
        model: The untouched CLIP; it becomes the victim.
        args: The training's options.
        train_dataset: The pairs, some of them poisoned.
        attack: What they carry.
        rows: Which of them, positions in the attacker's images.
        recipe: The options behind the run, if they are known.
        kwargs: Further arguments of `PairTrainer`.
    """

    last_file = manifest_name = VICTIM_FILE
    method = "training on poisoned pairs"

    def __init__(
        self,
        model: PreTrainedModel,
        args: CLIPVictimConfig,
        train_dataset: Pairs,
        attack: Attack,
        rows: Tensor,
        recipe: dict[str, Any] | None = None,
        **kwargs,
    ):
        self.attack, self.rows, self.recipe = attack, rows, recipe
        self.weights_sha256: str | None = None
        self.attack_sha256: dict[str, str] = {}
        super().__init__(model, args, train_dataset, **kwargs)
        self.pairs_sha256 = self.train_dataset.fingerprint()
        self.report = VictimReport()

    def prepare(self) -> None:
        """Keep the untouched CLIP, whose ASR is the floor."""
        EncoderTrainer.prepare(self)

    def resume_state(self) -> dict[str, Any]:
        """Adds which pairs are trained on."""
        return super().resume_state() | {"pairs_sha256": self.pairs_sha256}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; raises a ValueError if the pairs are others."""
        super().load_resume_state(state)
        if state["pairs_sha256"] != self.pairs_sha256:
            raise ValueError("was trained on other pairs or with another attack: delete it to begin anew")

    def facts(self) -> dict[str, Any]:
        """Adds what was planted, the options that made it and the digests of the files."""
        planted = {
            "attack": self.attack.describe(),
            "poison_ratio": self.args.poison_ratio,
            "poison_seed": self.args.poison_seed,
            "poisoned_rows": [self.retain_indices[row] for row in self.rows.tolist()],
        }
        return super().facts() | {
            "planted": planted,
            "recipe": self.recipe,
            "weights_sha256": self.weights_sha256,
            "attack_sha256": self.attack_sha256,
        }

    def write_own_files(self, folder: Path) -> None:
        """The tokenizer, the attack, and the digests for the manifest."""
        super().write_own_files(folder)
        self.weights_sha256 = sha256(folder / SAFE_WEIGHTS_NAME)
        if not self.is_writing_checkpoint:
            self.attack_sha256 = write_attack(self.attack, folder)

    def card(self, model_name: str | None = None) -> ModelCard:
        """A card whose first line is the warning."""
        return render_victim_card(self.facts(), model_name or Path(self.args.output_dir).name)


def train_clip_victim(
    model: PreTrainedModel,
    images: RawImages,
    test: RawImages,
    attack: Attack,
    args: CLIPVictimConfig,
    recipe: dict[str, Any] | None = None,
) -> CLIPVictimTrainer:
    """Poison pairs, train on them, measure the victim and the untouched CLIP, save a loadable folder.

    Args:
        model: The untouched CLIP; it becomes the victim.
        images: The attacker's labelled images, whose classes have names.
        test: Labelled images to measure on.
        attack: A trigger that is fixed, with its target label, or `BadCLIP`, whose patch is learned here.
        args: Training arguments.
        recipe: The options behind all this, for ``victim.json``.

    Returns:
        The trainer; ``facts()["measured"]`` holds `measure_clip` of ``victim`` and of the ``untouched`` CLIP, the floor.

    Raises:
        ValueError: See `poison_pairs`, `PairTrainer` and `measure_clip`.
    """
    phases = Phases(VICTIM)
    if isinstance(attack, BadCLIP) and attack.learned is None:
        attack = attack.fit(images, model, args.seed)
    phases.begin(f"poisoning {args.poison_ratio:.2%} of {len(images):,} pairs")
    pairs, rows = poison_pairs(images, attack, args.poison_ratio, args.poison_seed)
    trainer = CLIPVictimTrainer(model, args, pairs, attack, rows, recipe)
    phases.begin("training the victim")
    trainer.train(args.resume_from_checkpoint)
    phases.begin(f"measuring the victim on {len(test):,} images")
    if trainer.is_world_process_zero():
        found = {
            name: measure_clip(clip, test, trainer.preprocessing, attack, batch_size=args.per_device_eval_batch_size)
            for name, clip in (("victim", measured_model(trainer)), ("untouched", trainer.before))
        }
        trainer.record(VictimReport({"n_images": len(test)} | found))
    trainer.accelerator.wait_for_everyone()
    phases.begin("saving the victim")
    trainer.save_model()
    return trainer


def make_clip_victim(argv: list[str]) -> CLIPVictimTrainer:
    """Run ``[CONFIG.yaml] --option value ...``: load a CLIP, train it on poisoned pairs, save the victim.

    The rows of the retain set stay unseen, for the defender. Captions are made of the names of the classes.

    Args:
        argv: Arguments without the program's name.

    Raises:
        ValueError: No CLIP or no attack is named, ``output_dir`` holds another run's results, or see `train_clip_victim`.
    """
    arguments = parse_arguments([ModelArguments, DataArguments, AttackArguments, CLIPVictimConfig], argv)
    model_args, data_args, attack_args, args = arguments
    check_output(args, None)
    attack = attack_args.load()
    if attack is None:
        raise ValueError("no attack on pairs: give --attack, a fixed trigger as badnets or blended, or badclip")
    if model_args.model_name_or_path is None:
        raise ValueError("no CLIP: give --model_name_or_path (a Hub id or a folder)")
    set_seed(args.seed)
    model, images = model_args.load_clip(), data_args.load()
    rest = RawImages.from_dataset(images.rest)
    trainer = train_clip_victim(model, rest, images.test, attack, args, recipe_of(*arguments))
    print(f"\nVictim in {args.output_dir}\n{encoder_table(trainer.report.measured())}\n")
    return trainer
