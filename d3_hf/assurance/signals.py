"""The signals there are, and reading all of them: a new one is a line of `SIGNALS`."""

from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from ..data.images import RawImages
from ..files import first_line
from .anti_learning import anti_learning
from .canary import canary
from .finding import Finding
from .head_rows import head_rows
from .latent_shift import MOST_CLASSES as MOST_TO_SHIFT
from .latent_shift import latent_shift
from .maximum_margin import maximum_margin

Signal = Callable[[PreTrainedModel, RawImages], Finding]

# By the name that their findings carry.
SIGNALS: dict[str, Signal] = {
    "head_rows": head_rows,
    "latent_shift": latent_shift,
    "anti_learning": anti_learning,
    "maximum_margin": maximum_margin,
    "canary": canary,
}
# Classes beyond which a signal takes hours.
MOST_CLASSES = {"latent_shift": MOST_TO_SHIFT, "maximum_margin": 200, "canary": 500}

# What stands in every report beside the findings.
LIMITS = (
    "A backdoor from each class to the next, one that seldom works, and one that sleeps until the model is quantised, pruned "
    "or distilled may raise no signal: look at the form that is deployed.",
    "Networks without a backdoor lean to some class too, and may have learnt shortcuts of their own: an alarm accuses nobody.",
    "A p holds as far as the twins were made as the model was: of fewer images or by another schedule they score otherwise.",
)


def read_signal(name: str, signal: Signal, model: PreTrainedModel, images: RawImages) -> Finding | str:
    """The finding of a signal, or why it cannot be read, in one line.

    Args:
        name: Its key in `SIGNALS`.
        signal: The signal.
        model: A classifier of `load_classifier`; left as it was.
        images: Of every class, without triggers as far as is known.
    """
    classes = model.config.num_labels
    if classes > (most := MOST_CLASSES.get(name, classes)):
        return f"with {classes} classes it takes hours: it is read with at most {most}"
    try:
        return signal(model, images)
    except (ValueError, FloatingPointError, RuntimeError) as reason:  # the last of a solver, or of a device's memory
        return first_line(reason)


def read_signals(
    model: PreTrainedModel, images: RawImages, signals: Mapping[str, Signal] = SIGNALS
) -> dict[str, Finding | str]:
    """What each signal finds, by its name, or why it cannot be read; see `read_signal`."""
    return {name: read_signal(name, signal, model, images) for name, signal in signals.items()}
