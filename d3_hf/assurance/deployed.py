"""The forms in which a model is deployed: a backdoor may sleep in the file that is scanned and wake in one of these.

Each form is a function from a classifier to a changed copy, of which every signal can be read:

    latent_shift(quantised(model), images)

`quantised`: int8 dynamic quantisation of the linear layers, as of `torch.ao.quantization.quantize_dynamic` on x86. Weights are
rounded once, inputs in every pass, by the range of the whole batch:

    W <- s clip(round(W / s), -128, 127),    s = max |W| / 127.5
    x <- s (clip(round(x / s) + z, 0, 127) - z),    s = (max x - min x) / 127,    z = round(-min x / s),    0 in [min x, max x]

It is computed in floating point, where that function's layers give no gradient and have no weight that a signal could read (and
torch announces its removal). The gradient passes the rounding of inputs as if there were none. Other layers, convolutions too,
stay: on a CIFAR ResNet the head alone is quantised.

`pruned`: in each linear and convolutional layer the 30 % of its weights that are smallest in magnitude become 0.

Why: conditional backdoors sleep until the model is compressed; one that pruning wakes is published at an ASR of 0.4 % before
and 99.99 % after half of the weights are gone (PCB; from notes). Both forms depend on how hidden units are scaled, as those
that are deployed do: a rescaled network computes the same before and not after. Not covered: static quantisation, other numbers
of bits, structured pruning, distillation.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from ..models.computed import refuse_computed, refuse_hooked

PRUNED_SHARE = 0.3
HIGHEST_WEIGHT, LOWEST_WEIGHT = 127, -128
HIGHEST_INPUT = 127  # 7 bits: with 8 the sums of x86 instructions overflow
LEAST_SCALE = torch.finfo(torch.float32).eps


def quantised_weight(weight: Tensor) -> Tensor:
    """A weight rounded to int8, one scale for the whole tensor, zero at zero; of the same shape and dtype."""
    scale = (weight.abs().max() / 127.5).clamp_min(LEAST_SCALE)
    return (weight / scale).round().clamp(LOWEST_WEIGHT, HIGHEST_WEIGHT) * scale


def quantised_input(inputs: Tensor) -> Tensor:
    """A layer's inputs rounded to the levels that fit their own range, with the gradient of the inputs themselves."""
    values = inputs.detach()
    low, high = values.amin().clamp_max(0), values.amax().clamp_min(0)
    scale = ((high - low) / HIGHEST_INPUT).clamp_min(LEAST_SCALE)
    zero = (-low / scale).round()
    levels = ((values / scale).round() + zero).clamp(0, HIGHEST_INPUT)
    return inputs + ((levels - zero) * scale - values)


def pruned_weight(weight: Tensor) -> Tensor:
    """A weight with the 30 % of its entries that are smallest in magnitude at 0."""
    smallest = weight.abs().flatten().topk(round(PRUNED_SHARE * weight.numel()), largest=False).indices
    return weight.flatten().index_fill(0, smallest, 0).view(weight.shape)


def _quantise_input(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return quantised_input(args[0]), *args[1:]


def _is_quantised(layer: nn.Module) -> bool:
    # The latter belongs to torch's own attention, which reads its weight without calling it.
    return isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)


def _copied(model: PreTrainedModel, is_changed: Callable[[nn.Module], bool]) -> tuple[PreTrainedModel, list[nn.Module]]:
    """A copy of the model, and its layers that are to be changed; a ValueError if the weight of one is computed."""
    refuse_hooked(model)
    changed = copy.deepcopy(model)
    layers = {name: layer for name, layer in changed.named_modules() if is_changed(layer)}
    for name, layer in layers.items():
        refuse_computed(name, layer)
    return changed, list(layers.values())


@torch.no_grad()
def quantised(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose linear layers compute as after int8 dynamic quantisation, see the module's text.

    Args:
        model: A classifier; left as it was.

    Returns:
        The copy, with the same names of weights. It rounds in hooks, which ``save_pretrained`` does not write.

    Raises:
        ValueError: A weight is computed from others, or by a hook.
    """
    changed, layers = _copied(model, _is_quantised)
    for weight in {layer.weight for layer in layers}:  # once each: layers may share one
        weight.copy_(quantised_weight(weight))
    for layer in layers:
        layer.register_forward_pre_hook(_quantise_input)
    return changed


@torch.no_grad()
def pruned(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without the 30 % of each layer's weights that are smallest in magnitude, see the module's text.

    Args:
        model: A classifier; left as it was.

    Returns:
        The copy, with the same names of weights.

    Raises:
        ValueError: A weight is computed from others, or by a hook.
    """
    changed, layers = _copied(model, lambda layer: isinstance(layer, nn.Linear | nn.Conv2d))
    for weight in {layer.weight for layer in layers}:
        weight.copy_(pruned_weight(weight))
    return changed
