"""What must not stay beside purified weights: other weights, which many programs load first, and an earlier model's files."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from .manifest import MODEL_FILES

# Patterns of the names of files, or of folders of them, that hold weights or go with them: those of PyTorch, TensorFlow, Flax,
# ONNX, GGUF, OpenVINO, CoreML, TensorRT, ExecuTorch and Paddle, adapters, and the state of a training.
WEIGHTS = (
    "*.safetensors",
    "*.bin",
    *("*.pt", "*.pt2", "*.pth", "*.pth.tar", "*.th", "*.tar", "*.ckpt", "*.ckpt.*", "*.pkl", "*.pickle", "*.joblib"),
    *("*.torchscript", "*.ptl", "*.pte", "*.distcp"),
    *("*.h5", "*.hdf5", "*.keras", "*.pb", "*.tflite", "*.data-*-of-*", "variables.index"),
    *("*.msgpack", "*.npz"),
    *("*.onnx", "*.onnx_data*", "*.onnx.data", "*.ort"),
    *("*.gguf", "*.ggml"),
    "openvino*.xml",
    *("*.mlmodel", "*.mlpackage", "*.mlmodelc"),
    *("*.engine", "*.plan", "*.trt"),
    *("*.pdparams", "*.pdiparams"),
    "adapter_config.json",
    "*.index.json",
)


def holds_weights(path: str) -> bool:
    """Whether a file's path in a repository or a folder says that it holds weights, or goes with a file that does."""
    return any(fnmatchcase(part.lower(), pattern) for part in path.split("/") for pattern in WEIGHTS)


def leftovers(paths: Iterable[str], uploaded: Collection[str]) -> list[str]:
    """Of a repository's files, by their paths, those that must go when the ``uploaded`` ones come, sorted.

    They are all other weights, in every folder, and what an earlier model left: results, image processor, signature.
    """
    return sorted(path for path in paths if path not in uploaded and (holds_weights(path) or _may_be_ours(path)))


def other_weights(names: Iterable[str]) -> list[str]:
    """Of the names in a folder those of weights that no purified model or victim has, sorted."""
    return sorted(name for name in names if holds_weights(name) and not _may_be_ours(name))


def _may_be_ours(path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in MODEL_FILES)
