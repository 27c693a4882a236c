"""Weights files, read as if they were hostile, and the strict way of putting weights into a network.

Safetensors cannot carry code. Everything else is opened with torch's restricted unpickler (``weights_only=True``);
where that refuses, the file is refused: there is no other way in.
"""

import contextlib
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import join_names
from ..files import first_line
from .differences import Differences
from .shared import shared_names, with_all_names
from .weight_names import told

logger = logging.getLogger(__name__)


PICKLED = (".pth", ".pt", ".tar", ".th", ".bin", ".ckpt")


# Where training scripts put the weights in what they save, in timm's order of preference; then those of other
# toolboxes.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "net", "model_state_dict")


# Types that hold a weight as it is; integers and eight bits need scales to mean anything, complex ones another network.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


SHOWN = 4  # entries of a foreign file, in a message

# In torch's errors that advise to load without restriction, or that speak of loading a program.
ADVICE = ("weights_only", "torch.jit")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of one file, without running anything that it may contain.

    A state dict inside a training checkpoint is taken out of it; names are as the file has them.

    Args:
        path: A ``.safetensors`` file, or a state dict that `torch.save` wrote.

    Returns:
        Tensors on the CPU by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is unknown; the file is truncated or of another format; it wants to run code; it claims more
            than it holds; it holds no tensors, something that is not a tensor, or quantised or complex weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    elif path.suffix in PICKLED:
        contents = _unpack(_read_pickle(path), path)
    else:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; expected .safetensors or {', '.join(PICKLED)}")
    if not contents:
        raise ValueError(f"{path} holds no weights")
    strange = [f"{name} ({tensor.dtype})" for name, tensor in contents.items() if _is_strange(name, tensor)]
    if strange:
        raise ValueError(
            f"{path}: quantised or complex weights, {told(strange)}, cannot be purified: load the original in float32, "
            "float16 or bfloat16"
        )
    return contents


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            written_by = (file.metadata() or {}).get("format", "pt")
        if written_by == "pt":
            return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({first_line(error)}): fetch it again") from error
    raise ValueError(f"{path} has the layout of another library (format {written_by!r}): ask its author for PyTorch's")


def _is_strange(name: str, tensor: Tensor) -> bool:
    counts = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)  # a counter or an index
    return tensor.dtype not in FLOATS and not (counts and not name.endswith(("weight", "bias")))


def _read_pickle(path: Path) -> Any:
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is TorchScript, a program with its weights, and was not opened: ask its author for safetensors or a state "
            "dict (module.state_dict())"
        )
    try:
        claimed = _unpacked_size(path)
        if claimed <= path.stat().st_size:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about pickles of other kinds: what is raised says it better
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ValueError(
                f"{path} is no state dict that torch.save wrote (a pickle of another kind can run code: it was not loaded and "
                "nothing of it ran); ask its author for safetensors or a state dict"
            ) from error
        raise ValueError(
            f"{path} was not opened: it wants to run {wanted[1]}, and a weights file may hold only tensors; ask "
            "its author for safetensors, or convert it inside a sandbox"
        ) from error
    except Exception as error:  # a damaged or foreign file can fail in any way; none of them is recovered from
        advises = any(word in str(error) for word in ADVICE)
        reason = type(error).__name__ + ("" if advises else f": {first_line(error)}")
        raise ValueError(
            f"{path} is no complete state dict that torch.save wrote ({reason}): ask its author for safetensors"
        ) from error
    raise ValueError(
        f"{path} was not opened: it unpacks to {claimed:,} bytes from {path.stat().st_size:,}, which torch.save does not; ask "
        "its author for safetensors"
    )


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.endswith("constants.pkl") for entry in archive.namelist())
    except zipfile.BadZipFile:  # another kind of file, or a damaged one, of which torch.load tells
        return False


def _unpacked_size(path: Path) -> int:
    """Bytes that a zip archive says it unpacks to; 0 for another file. `torch.save` does not compress: more than the file has
    was made to fill the memory of who opens it."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _unpack(contents: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(contents, dict):
        container = next((key for key in CONTAINERS if isinstance(contents.get(key), dict)), None) or _only_state_dict(contents)
        if container is not None:
            logger.info("%s: weights taken from its entry %r", path, container)
            contents = contents[container]
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a state dict (a dict of tensors by name)")
    others = [
        f"{key!r} ({type(value).__name__})"
        for key, value in sorted(contents.items(), key=lambda entry: not isinstance(entry[1], dict))  # where weights may be
        if not isinstance(value, Tensor) or not isinstance(key, str) or value.layout != torch.strided or value.is_meta
    ]
    if others:
        raise ValueError(
            f"{path} is no state dict, which holds tensors by name; found {join_names(others, SHOWN)}; weights are looked for "
            f"at the top and under {', '.join(CONTAINERS)}"
        )
    size = path.stat().st_size
    if claims := [key for key, value in contents.items() if value.numel() * value.element_size() > size]:
        raise ValueError(f"{path}: {told(claims)} would fill more memory than the file's {size:,} bytes: ask for safetensors")
    return dict(contents)


def _only_state_dict(contents: dict[Any, Any]) -> str | None:
    """Key of the one entry that is a dict of tensors by name, in a checkpoint without any of the known keys."""
    found = [
        key
        for key, value in contents.items()
        if isinstance(value, dict) and value and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())
    ]
    return found[0] if len(found) == 1 and not any(isinstance(value, Tensor) for value in contents.values()) else None


def load_pretrained(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor], where: str
) -> PreTrainedModel:
    """Build a transformers model in float32 with exactly these weights, in evaluation mode.

    Args:
        model_class: What to build.
        config: Its configuration.
        weights: As its file has them; transformers translates names of older releases.
        where: Where the weights come from, for messages.

    Raises:
        ValueError: The weights are an encoder's, or those of another network, or see `build_pretrained`.
    """
    model, differences = build_pretrained(model_class, config, weights, where)
    differences.refuse_headless(model, where)
    differences.refuse(where)
    return model


def build_pretrained(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor], where: str
) -> tuple[PreTrainedModel, Differences]:
    """As `load_pretrained`, with what the weights lack drawn at random, and how they differ from the model's.

    Raises:
        ValueError: The model cannot be built from the configuration; values of the weights are wrong; one tensor has two, see
            `with_all_names`.
    """
    refuse_non_finite(weights, where)
    model, report = _build(model_class, config, weights, where)
    # Which tensors go under several names only a network says that has been built.
    if shared := shared_names(model):
        completed = with_all_names(weights, shared, where, f"{model_class.base_model_prefix}.")
        if completed.keys() != weights.keys():
            model, report = _build(model_class, config, completed, where)
    model.name_or_path = model.config.name_or_path = ""  # from_pretrained(None) leaves the string "None"
    return model, Differences.of(report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor], where: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        # Without a folder, from_pretrained has no adapter, pickle or custom code to look for: only these tensors.
        with _quiet_transformers():
            return model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(weights),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: no {model_class.__name__} can be built from its config: {first_line(error)}") from error


def load_module(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load weights into a plain module, strictly.

    Raises:
        ValueError: Names, shapes or values of the weights are wrong.
    """
    refuse_non_finite(weights, where)
    weights = with_all_names(weights, shared_names(module), where)
    expected = module.state_dict()
    mismatched = [
        (name, weights[name].shape, tensor.shape)
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    Differences.of(expected.keys() - weights.keys(), weights.keys() - expected.keys(), mismatched).refuse(where)
    module.load_state_dict(weights, strict=True)


def refuse_non_finite(weights: dict[str, Tensor], where: str) -> None:
    """Raise a ValueError that names the weights with a NaN or an infinity."""
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{where}: NaN or infinite values in {told(bad)}")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    # It would log a table of the same faults that are raised here in one line.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
