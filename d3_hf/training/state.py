"""What a run must remember beyond weights, optimizer and random state: one file of each checkpoint."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

STATE_FILE = "purification_state.safetensors"
VALUES = "values"  # in the file's metadata: what is no tensor, as JSON


def write_state(state: dict[str, Any], checkpoint: Path) -> None:
    """Write a state into a checkpoint's folder.

    Args:
        state: By name tensors, and values that JSON can hold.
        checkpoint: The folder.
    """
    tensors = {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    save_file(tensors, checkpoint / STATE_FILE, metadata={VALUES: json.dumps(values)})


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU.

    Raises:
        ValueError: The checkpoint holds no such file: it is another program's, or an earlier version's.
    """
    file = checkpoint / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{checkpoint} holds no {STATE_FILE}: it is no checkpoint of this version; begin the run anew")
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        return tensors | json.loads(stored.metadata()[VALUES])
