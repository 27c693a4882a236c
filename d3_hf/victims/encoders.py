"""Victims that are encoders: a backdoor planted in an encoder, deliberately, to measure defences on.

The objective follows from the attack. BadEncoder plants by losses of its own, in an encoder that is there. Attacks that poison
images, and no attack, pretrain one by SimCLR, from scratch or from a checkpoint.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, set_seed

from ..attacks import ENCODER_ATTACKS, Attack, BadEncoder, LearnedAttack, poison
from ..data.images import RawImages
from ..evaluation.encoders import measure_encoder, reference_similarity
from ..evaluation.measure import measured_model
from ..models import new_encoder
from ..models.source import preprocessing_of, source_of
from ..options.arguments import AttackArguments, DataArguments, ModelArguments, ProbeArguments
from ..options.parser import parse_arguments
from ..publishing.card import victim_table
from ..publishing.manifest import source_facts
from ..training.checkpoints import check_output
from ..training.phases import VICTIM, Phases
from .encoder_trainers import BadEncoderTrainer, EncoderVictimConfig, EncoderVictimTrainer
from .plan import VictimPlan, VictimReport
from .record import recipe_of
from .simclr import SimCLRTrainer
from .train import images_digest

POISON_RATIO = 0.05  # TSC's of CTRL; the authors' own 1 % makes a weak backdoor in small encoders


@dataclass
class EncoderVictimArguments:
    """How the victim comes about.

    Args:
        poison_ratio: Share of the attacker's images that are poisoned, in (0, 1]; default 5 %. Not for BadEncoder, which
            poisons none.
        poison_seed: Chooses them, and is the seed of a learned trigger.
        clean_model: Folder of an encoder that was pretrained likewise without a trigger: the floor of the ASR. Default: the
            checkpoint that is continued, if one is.
    """

    poison_ratio: float | None = field(default=None, metadata={"help": "Share of the attacker's images that are poisoned."})
    poison_seed: int = field(default=0, metadata={"help": "Chooses the poisoned images."})
    clean_model: str | None = field(default=None, metadata={"help": "Folder of an encoder without a backdoor."})


def train_encoder_victim(
    model: PreTrainedModel,
    shadow: RawImages,
    probe: RawImages,
    test: RawImages,
    attack: Attack | None,
    args: EncoderVictimConfig,
    recipe: dict[str, Any] | None = None,
    *,
    poison_ratio: float | None = None,
    poison_seed: int = 0,
    clean_model: PreTrainedModel | None = None,
) -> EncoderVictimTrainer:
    """Learn the trigger, train the victim, measure it and an encoder without a backdoor, save a loadable folder.

    Args:
        model: The encoder, untrained or not; it becomes the victim.
        shadow: The attacker's images; of their labels only those of the target class count, for references and poison.
        probe: Labelled images without any trigger, to train probes on.
        test: Images to measure on.
        attack: What to plant, of `ENCODER_ATTACKS`; None pretrains the same encoder without a backdoor.
        args: Training arguments.
        recipe: The options behind all this, for ``victim.json``.
        poison_ratio: Share of ``shadow`` that is poisoned; None: `POISON_RATIO`. Not for BadEncoder.
        poison_seed: See `EncoderVictimArguments`.
        clean_model: Encoder for the floor. Default: ``model`` as it was, unless it is new and SimCLR trains it.

    Returns:
        The trainer; ``facts()["measured"]`` holds `measure_encoder` of ``victim`` and, where there is one, of the ``untouched``
        encoder, the floor; and for BadEncoder the similarity of triggered images to the reference for both.

    Raises:
        ValueError: BadEncoder is given a ``poison_ratio``, or see `BadEncoder.fit`, `poison`, `EncoderTrainer` and
            `measure_encoder`.
    """
    phases, plants = Phases(VICTIM), isinstance(attack, BadEncoder)
    what = "victim" if attack else "encoder without a backdoor"
    if plants and poison_ratio is not None:
        raise ValueError("badencoder poisons no images: leave poison_ratio out")
    phases.begin(f"preparing {len(shadow):,} images" + (f" and the trigger of {attack.name}" if attack else ""))
    if isinstance(attack, LearnedAttack) and attack.learned is None:
        attack = attack.fit(shadow, model, poison_seed)
    images, rows = shadow, None
    ratio = POISON_RATIO if poison_ratio is None else poison_ratio
    if attack and not plants:
        images, rows = poison(shadow, attack, ratio, poison_seed)
    plan = VictimPlan(
        attack=attack,
        poison_ratio=ratio,
        poison_seed=poison_seed,
        rows=rows,
        row_numbers=None if rows is None else shadow.index[rows].tolist(),
        recipe=recipe,
        images_sha256=images_digest(shadow),
        poisoned_sha256=None if rows is None else images_digest(images),
        clean_model=None if clean_model is None else source_facts(clean_model),
    )
    trainer = (BadEncoderTrainer if plants else SimCLRTrainer)(model, args, images, plan)
    if clean_model is None and (plants or source_of(model) is not None):
        clean_model = trainer.before
    phases.begin(f"training the {what}")
    trainer.train(args.resume_from_checkpoint)
    phases.begin(f"measuring the {what} on {len(test):,} images")
    if trainer.is_world_process_zero():
        encoders = {"victim": measured_model(trainer)} | ({"untouched": clean_model} if clean_model is not None else {})
        found = {name: _measured(encoder, probe, test, attack, args) for name, encoder in encoders.items()}
        trainer.record(VictimReport({"n_images": len(test), "n_probe": len(probe)} | found))
    trainer.accelerator.wait_for_everyone()
    phases.begin(f"saving the {what}")
    trainer.save_model()
    return trainer


def _measured(
    encoder: PreTrainedModel, probe: RawImages, test: RawImages, attack: Attack | None, args: EncoderVictimConfig
) -> dict[str, Any]:
    encoder, preprocessing = encoder.to(args.device), preprocessing_of(encoder)
    found = measure_encoder(encoder, probe, test, preprocessing, attack, batch_size=args.per_device_eval_batch_size)
    if isinstance(attack, BadEncoder):
        alike = reference_similarity(encoder, test, preprocessing, attack.trigger, attack.reference)
        found["reference_similarity"] = alike
    return found


ENCODER_KINDS = [ModelArguments, DataArguments, AttackArguments, ProbeArguments, EncoderVictimArguments, EncoderVictimConfig]


def make_encoder_victim(argv: list[str]) -> EncoderVictimTrainer:
    """Run ``[CONFIG.yaml] --option value ...``: load or make an encoder, plant the backdoor, save the victim.

    The rows of the retain set stay unseen, for the defender; probes are trained on others that the attacker does not see
    either. Without ``--attack`` the same encoder is pretrained without a backdoor, as a reference.

    Args:
        argv: Arguments without the program's name.

    Raises:
        ValueError: There is neither a checkpoint nor an architecture, or none that BadEncoder could be planted in; the attack
            is one on classifiers; ``output_dir`` holds another run's results; or see `train_encoder_victim`.
    """
    arguments = parse_arguments(ENCODER_KINDS, argv)
    model_args, data_args, attack_args, probe_args, victim_args, args = arguments
    check_output(args, None)
    attack = attack_args.load()
    if attack is not None and attack.name not in ENCODER_ATTACKS:
        raise ValueError(f"{attack.name} is no attack on encoders: give --attack, one of {', '.join(ENCODER_ATTACKS)}")
    set_seed(args.seed)
    model = _encoder(model_args, attack)
    clean_model = model_args.of(victim_args.clean_model).load_encoder() if victim_args.clean_model else None
    images = data_args.load()
    probe, shadow = probe_args.draw(images.rest)
    trainer = train_encoder_victim(
        model,
        shadow,
        probe,
        images.test,
        attack,
        args,
        recipe_of(*arguments),
        poison_ratio=victim_args.poison_ratio,
        poison_seed=victim_args.poison_seed,
        clean_model=clean_model,
    )
    print(f"\n{'Victim' if attack else 'Encoder without backdoor'} in {args.output_dir}\n{victim_table(trainer.facts())}\n")
    return trainer


def _encoder(model_args: ModelArguments, attack: Attack | None) -> PreTrainedModel:
    if model_args.model_name_or_path:
        return model_args.load_encoder()
    if isinstance(attack, BadEncoder):
        raise ValueError(
            "no encoder: badencoder is planted in one that is trained: give --model_name_or_path (a Hub id, a folder or a file)"
        )
    if model_args.architecture is None:
        raise ValueError(
            "no encoder: give --architecture to pretrain one from scratch, or --model_name_or_path to continue one"
        )
    shape = (model_args.image_mean, model_args.image_std, model_args.image_size)
    return new_encoder(model_args.architecture, *shape, model_args.model_args)
