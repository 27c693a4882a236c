"""Which library loads what `save_pretrained` writes of a classifier."""

from transformers import PreTrainedModel, TimmWrapperConfig

from .wrapper import WrappedClassifierConfig


def library_of(model: PreTrainedModel) -> str:
    """``"transformers"`` where its Auto class rebuilds the network, timm's among them; ``"d3_hf"`` where it cannot alone.

    The latter are networks that only this package registers with timm, and modules, whose code nobody stores.
    """
    config = model.config
    if isinstance(config, WrappedClassifierConfig):
        return "d3_hf"
    if isinstance(config, TimmWrapperConfig):
        import timm

        if timm.is_model(config.architecture) and timm.model_entrypoint(config.architecture).__module__.startswith("d3_hf."):
            return "d3_hf"
    return "transformers"


def network_facts(model: PreTrainedModel) -> dict[str, str]:
    """What a classifier's network is and what loads it: ``class``, ``architecture`` and ``library``; for manifest and card."""
    return {"class": type(model).__name__, "architecture": architecture_of(model), "library": library_of(model)}


def architecture_of(model: PreTrainedModel) -> str:
    """The network's name: timm's where it has one, a wrapped module's class, else its type among transformers'."""
    config = model.config
    return getattr(config, "architecture", None) or getattr(config, "module_class", None) or config.model_type
