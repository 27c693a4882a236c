"""What a purification costs: passes through the network, memory, on which machine."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


class PassMeter:
    """Counts the images that go forward and backward through a classifier and its copies.

    Attributes:
        forward: Images forward so far; those of D3's active set go forward twice, the first time without graph.
        backward: Images backward so far, for weights or for pixels.
    """

    def __init__(self) -> None:
        self.forward = self.backward = 0

    @contextlib.contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count inside; copies that are made of the model meanwhile are counted too.

        Args:
            model: Classifier whose output has ``logits`` (B, C).
        """

        def count_backward(gradient: Tensor) -> None:
            self.backward += len(gradient)

        # Plain functions: a copy of the model takes them along as they are, and with them this meter.
        def count(module: nn.Module, args: tuple, output) -> None:
            self.forward += len(output.logits)
            if output.logits.requires_grad:
                output.logits.register_hook(count_backward)

        handle = model.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()


def reset_peak_memory() -> None:
    """Forget the peak: `peak_memory` counts from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # only Linux has it; elsewhere the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float | None:
    """Peak memory since `reset_peak_memory`, in MiB: allocated on the GPU, else resident in this process; None if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def hardware() -> str:
    """The GPU's name, or processor and threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"
