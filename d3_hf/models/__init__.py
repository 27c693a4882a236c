"""From any source to one kind of classifier or encoder: loading (`load.py`, `encoders.py`), wrapping (`wrapper.py`) and the
networks that hubs lack.

Names are looked up on first use, so that importing this package loads neither torch nor transformers.
"""

import importlib

_HOMES = {
    "Source": "source",
    "WrappedClassifier": "wrapper",
    "WrappedEncoder": "wrapper",
    "load_classifier": "load",
    "load_clip": "clip",
    "load_encoder": "encoders",
    "new_classifier": "architectures",
    "new_encoder": "new",
    "new_model": "new",
}
__all__ = [  # noqa: F822
    "Source",
    "WrappedClassifier",
    "WrappedEncoder",
    "load_classifier",
    "load_clip",
    "load_encoder",
    "new_classifier",
    "new_encoder",
    "new_model",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
