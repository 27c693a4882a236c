"""Guard rails as options, which load in no time; `guard` holds what they mean."""

from dataclasses import asdict, dataclass, field


@dataclass
class GuardArguments:
    """When a purified model is rejected; shares in [0, 1] of the test images as they are, so 0.05 is five points.

    Args:
        max_accuracy_drop: Points of ACC that the purification may cost. 0.05 in the recipes and on the command line (here);
            1 turns it off. `workflow.purify` has no rails unless it is given some. The drop that was measured decides; where
            its 95 % interval lies on both sides of the limit, the reason or a warning says that the images cannot tell.
        min_class_accuracy: ACC that every class must keep; a class without test images is passed over. Default off.
        min_agreement: Share of the test images on which the purified model must predict what the suspicious one did, be it
            right or wrong. Default off.

    Raises:
        ValueError: A value is not in [0, 1].
    """

    max_accuracy_drop: float | None = field(default=0.05, metadata={"help": "Reject if ACC falls by more; 0.05 is 5 points."})
    min_class_accuracy: float | None = field(default=None, metadata={"help": "Reject if the ACC of any class is lower."})
    min_agreement: float | None = field(default=None, metadata={"help": "Reject if fewer predictions stay the same."})

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], as 0.05 for five points; got {value}")
