"""What `purify` refuses and prints, of a classifier and of an encoder."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what does more than read options is loaded when they are read: help and mistakes answer sooner
    from ..training.config import PurifyConfig
    from ..training.trainer import PurifyTrainer


def refuse_fp16_without_gpu(args: "PurifyConfig") -> None:
    """Raise a ValueError for fp16 on a CPU, before anything is loaded."""
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 is for a GPU and this run has none: use bf16, or leave it out")


def print_summary(trainer: "PurifyTrainer", folder: Path) -> None:
    """Print the rates before and after, the seconds, and that the model lies in ``folder``."""
    from ..models.kinds import model_kind

    print(f"\n{trainer.report}\n")
    if trainer.report.audit:
        from ..publishing.tables import audit_line

        print(audit_line(trainer.report.audit))
    print(", ".join(f"{name} {value:.1f} s" for name, value in trainer.report.seconds.items()))
    what = "Rejected" if trainer.report.rejected else "Purified"
    kinds = {"classifier": "model", "encoder": "encoder", "clip": "CLIP"}
    print(f"{what} {kinds[model_kind(trainer.plain)]}, card and evidence: {folder}")
