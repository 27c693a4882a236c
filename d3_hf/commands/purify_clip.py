"""``d3-hf purify --defence NAME`` where the method is one of a whole CLIP."""

from pathlib import Path
from typing import Any

from ..defenses import configuration, defence
from ..options.arguments import NO_IMAGES, AttackArguments, DataArguments, ModelArguments
from ..options.pairs import PairArguments
from ..options.parser import parse_arguments
from ..publishing.card_arguments import SourceArguments
from .summary import print_summary, refuse_fp16_without_gpu

OPTIONS = [ModelArguments, DataArguments, PairArguments, AttackArguments, SourceArguments]


def run(method: str, argv: list[str]) -> dict[str, Any]:
    """Run ``[CONFIG.yaml] --option value ...``: load a CLIP, purify both towers on pairs, print its zero-shot rates.

    Args:
        method: A key of `CLIP_DEFENCES`.
        argv: Arguments without the program's name and the method.

    Returns:
        `Report.results` of `purify_clip`.

    Raises:
        ValueError: No CLIP or no images are named, the checkpoint is no CLIP, there are no captions and no class names to make
            them of, or see `load_clip`, `PairArguments.load` and the defence.
    """
    model_args, data_args, pair_args, attack_args, source_args, args = parse_arguments([*OPTIONS, configuration(method)], argv)
    refuse_fp16_without_gpu(args)
    if model_args.model_name_or_path is None:
        raise ValueError("no CLIP: give --model_name_or_path (a Hub id or a folder)")
    if data_args.dataset_name is None:
        raise ValueError(NO_IMAGES)
    from ..publishing.manifest import public_name
    from ..publishing.report import Report
    from ..workflow import purify_clip

    attack, model = attack_args.load(), model_args.load_clip()
    images, pairs = pair_args.load(data_args)
    _, trainer_class = defence(method)
    trainer = trainer_class(model=model, args=args, train_dataset=pairs, data_source=images.source)
    trainer.describe(**source_args.details())
    measured_on = public_name(pair_args.zero_shot_dataset or images.source)
    report = Report(data=measured_on, configuration=images.configuration, split=images.split)
    report = purify_clip(trainer, images.test, attack, report)
    if report.results:
        print_summary(trainer, Path(args.output_dir))
    return report.results
