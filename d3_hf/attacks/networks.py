"""Networks that draw a trigger: as tensors that a victim's folder can keep, and back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .base import LearnedAttack


def weights_of(name: str, network: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's weights and running statistics on the CPU, float32, as ``name.key``.

    The count of batches that BatchNorm keeps is left out: a fixed momentum does not use it.
    """
    return {
        f"{name}.{key}": value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for key, value in network.state_dict().items()
        if value.is_floating_point()
    }


def restored(name: str, make: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """What ``make`` builds, with copies of the weights that `weights_of` gave under ``name``; draws no random numbers."""
    with torch.device("meta"):
        network = make()
    own = {key.removeprefix(f"{name}."): value.clone() for key, value in weights.items() if key.startswith(f"{name}.")}
    network.load_state_dict(own, assign=True)
    return network.to(memory_format=torch.channels_last)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Inside, cuDNN convolves in float32, the same way each time: TF32, its default, is too coarse for grey levels."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    # Not `allow_tf32`, which raises where TF32 was switched on by the newer setting, as the Trainer does for torch_compile.
    cudnn.conv.fp32_precision, cudnn.deterministic = "ieee", True
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = before


@dataclass(frozen=True, kw_only=True)
class NetworkAttack(LearnedAttack):
    """A learned attack whose ``learned`` holds the weights of networks; see `LearnedAttack`."""

    def _network(self, name: str, make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
        """The network `restored` from ``learned`` on ``device``, in eval mode; built once."""
        if (name, device) not in self._networks:
            with torch.inference_mode(False):  # or else a measurement would leave tensors that no other mode may use
                self._networks[name, device] = restored(name, make, self._need()).to(device).eval()
        return self._networks[name, device]

    @cached_property
    def _networks(self) -> dict[tuple[str, torch.device], nn.Module]:
        return {}
