"""Image processors as checkpoints describe them, those of older releases of transformers included."""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import constants
from transformers import AutoImageProcessor, BaseImageProcessor

from ..data.preprocessing import Preprocessing
from ..errors import go_online
from .checkpoint_files import read_settings

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def read_processor(source: str | Path, name: str) -> BaseImageProcessor:
    """Return the image processor of a folder or Hub id.

    Args:
        source: Where it is.
        name: What to call it in messages.

    Raises:
        ValueError: There is none that transformers knows; it cannot be fetched; or two files describe it differently.
    """
    settings = _settings(Path(source), name) if Path(source).is_dir() else {}
    kind = settings.get("image_processor_type")
    try:
        if isinstance(kind, str) and (today := _name_today(kind)) != kind and hasattr(transformers, today):
            return getattr(transformers, today).from_dict(settings)
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        told = f" (image_processor_type {kind!r})" if kind else ""
        advice = f"put its {PREPROCESSOR} there"
        if not Path(source).is_dir() and isinstance(error, OSError) and constants.HF_HUB_OFFLINE:
            advice = go_online(True)
        raise ValueError(
            f"{name} has no image processor that transformers knows{told}: {advice}, or in Python pass one as image_processor"
        ) from error


def at_size(processor: BaseImageProcessor, size: tuple[int, int], where: str) -> BaseImageProcessor:
    """Return the same image processor for images of another size; nothing is cut off those that have it.

    Args:
        processor: One of transformers; what it does besides resizing and cropping stays.
        size: (height, width) in pixels.
        where: What to call its checkpoint in messages.

    Raises:
        ValueError: It cannot make images of that size.
    """
    height, width = size
    settings = processor.to_dict()
    pixels = {"height": height, "width": width}
    by_edge = height == width and "shortest_edge" in (settings.get("size") or {})
    changes = {"size": {"shortest_edge": height} if by_edge else pixels, "crop_size": pixels}
    changes |= {"crop_pct": 1.0, "do_resize": True}
    try:
        changed = type(processor).from_dict(settings | {name: changes[name] for name in changes.keys() & settings.keys()})
        fits = Preprocessing.from_processor(changed).size == size
    except (AttributeError, KeyError, TypeError, ValueError):  # as transformers says that it wants another form of size
        fits = False
    if not fits:
        raise ValueError(
            f"{where}: its {type(processor).__name__} cannot make images of {height} x {width} pixels: leave image_size out, "
            "or in Python pass an image_processor"
        )
    return changed


def _name_today(kind: str) -> str:
    """The class that took over from a feature extractor of transformers 4."""
    return kind.replace("FeatureExtractor", "ImageProcessor")


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """What a folder says of its image processor, from the file that transformers prefers; {} where it is timm's config.json."""
    nested = _read(folder / PROCESSOR, name).get("image_processor")
    found = {PROCESSOR: nested, PREPROCESSOR: _read(folder / PREPROCESSOR, name)}
    timm = _read(folder / "config.json", name).get("pretrained_cfg")
    if isinstance(timm, dict):
        found["config.json"] = {f"image_{entry}": timm[entry] for entry in ("mean", "std") if entry in timm}
    given = {file: settings for file, settings in found.items() if isinstance(settings, dict) and settings}
    _refuse_contradictions(given, name)
    return {} if isinstance(timm, dict) else next(iter(given.values()), {})


def _refuse_contradictions(given: dict[str, dict[str, Any]], name: str) -> None:
    """Refuse files of which one program reads this and another that, as releases of transformers do."""
    (first, mine), *others = given.items() or [("", {})]
    for second, theirs in others:
        both = [entry for entry in sorted(mine.keys() & theirs.keys()) if not entry.endswith(("_type", "_class"))]
        # Of a size in the form of older releases, one number for two, nothing can be said.
        differ = [entry for entry in both if type(mine[entry]) is type(theirs[entry]) and mine[entry] != theirs[entry]]
        if differ:
            raise ValueError(
                f"{name}: {first} and {second} describe two image processors ({', '.join(differ)}): remove the one that is "
                "not meant"
            )


def _read(file: Path, name: str) -> dict[str, Any]:
    return read_settings(file, name, "settings") if file.is_file() else {}
