"""Weights that are computed from other parameters in every forward pass: whoever writes into them changes nothing.

Parametrisations (`torch.nn.utils.parametrizations`), the hooks that came before them, and pruning that is not permanent.
"""

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# By the hook that computes the weight: what has been done to the layer, and what takes it off again.
HOOKS = {
    WeightNorm: ("under torch.nn.utils.weight_norm", "torch.nn.utils.remove_weight_norm(layer)"),
    SpectralNorm: ("under torch.nn.utils.spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"),
    prune.BasePruningMethod: ("pruned by a mask", "torch.nn.utils.prune.remove(layer, 'weight')"),
}


def refuse_computed(name: str, layer: nn.Module, tensor: str = "weight") -> None:
    """Raise a ValueError that says what computes a layer's tensor and how to make it a plain one, unless it is."""
    if is_parametrized(layer, tensor):
        kinds = ", ".join(type(step).__name__ for step in layer.parametrizations[tensor])
        how = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})"
        raise ValueError(_refusal(name, tensor, f"parametrised ({kinds})", how))
    if hook := _hook(layer):
        raise ValueError(_refusal(name, tensor, *hook))


def refuse_hooked(model: nn.Module) -> None:
    """Raise a ValueError for a layer whose weight a hook computes: such a model cannot be copied once it has run."""
    for name, layer in model.named_modules():
        if hook := _hook(layer):
            raise ValueError(_refusal(name, "weight", *hook))


def _hook(layer: nn.Module) -> tuple[str, str] | None:
    for hook in layer._forward_pre_hooks.values():
        for kind, found in HOOKS.items():
            if isinstance(hook, kind):
                return found
    return None


def _refusal(name: str, tensor: str, what: str, how: str) -> str:
    return f"{name} is {what}: its {tensor} is computed anew in every pass and cannot be changed; make it plain first, by {how}"
