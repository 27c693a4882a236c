"""``d3-hf purify --defence NAME`` where the method is one of encoders."""

from pathlib import Path
from typing import Any

from ..defenses import configuration, defence
from ..options.arguments import NO_IMAGES, AttackArguments, DataArguments, ModelArguments, ProbeArguments
from ..options.parser import parse_arguments
from ..publishing.card_arguments import SourceArguments
from .summary import print_summary, refuse_fp16_without_gpu

OPTIONS = [ModelArguments, DataArguments, AttackArguments, ProbeArguments, SourceArguments]


def run(method: str, argv: list[str]) -> dict[str, Any]:
    """Run ``[CONFIG.yaml] --option value ...``: load an encoder, purify it without labels, print the table of its probes.

    The retain set's labels are not looked at. The probes that measure are trained on labelled images that the retain set
    leaves.

    Args:
        method: A key of `ENCODER_DEFENCES`.
        argv: Arguments without the program's name and the method.

    Returns:
        `Report.results` of `purify_encoder`.

    Raises:
        ValueError: No encoder or no images are named, the checkpoint is a classifier, or see `load_encoder`, `load_images` and
            the defence.
    """
    options = [*OPTIONS, configuration(method, of_encoders=True)]
    model_args, data_args, attack_args, probe_args, source_args, args = parse_arguments(options, argv)
    refuse_fp16_without_gpu(args)
    if model_args.model_name_or_path is None:
        raise ValueError("no encoder: give --model_name_or_path (a Hub id, a folder or a file)")
    if data_args.dataset_name is None:
        raise ValueError(NO_IMAGES)
    from ..publishing.manifest import public_name
    from ..publishing.report import Report
    from ..workflow import purify_encoder

    attack, model = attack_args.load(), model_args.load_encoder()
    images = data_args.load()
    probe, _ = probe_args.draw(images.rest)
    _, trainer_class = defence(method, of_encoders=True)
    trainer = trainer_class(model=model, args=args, train_dataset=images.retain, data_source=images.source)
    trainer.describe(**source_args.details())
    report = Report(data=public_name(images.source), configuration=images.configuration, split=images.split)
    report = purify_encoder(trainer, probe, images.test, attack, report)
    if report.results:
        print_summary(trainer, Path(args.output_dir))
    return report.results
