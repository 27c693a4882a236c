"""``d3-hf env``: what a bug report has to say of the machine."""

import os
import platform
from typing import Any

from ..options.parser import Parser

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def run(argv: list[str]) -> dict[str, Any]:
    """Print versions, system and devices: no path, no name of a machine or a user.

    Args:
        argv: Arguments without the program's name; none.

    Returns:
        Versions by package, ``system``, each device by torch's name for it, and what is ``offline``.
    """
    Parser([]).read(argv)
    import torch  # takes seconds, which the help need not

    from ..publishing.manifest import versions

    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator and torch.accelerator.is_available() else "cpu"
    devices = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    if kind == "cuda":
        devices |= {f"cuda:{number}": torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    elif kind != "cpu":
        devices[kind] = f"{torch.accelerator.device_count()} of them"
    offline = ", ".join(name for name in OFFLINE if os.environ.get(name)) or "no"
    found = versions() | {"system": f"{platform.system()} {platform.machine()}", **devices, "offline": offline}
    for name, value in found.items():
        print(f"{name}: {value}")
    return found
