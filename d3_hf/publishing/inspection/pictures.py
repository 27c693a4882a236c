"""Pictures that a page carries in itself, as data URIs."""

import base64
import io
import warnings

import numpy as np
from PIL import Image

from ..pictures.drawing import drawn

MOST_BARS = 40  # classes in a figure
ORDINARY, MARKED = "#8a9bb0", "#c0392b"
ENLARGED = 160  # pixels that a trigger's smaller side gets at least


def bars(scores: list[float], names: list[str], suspect: str, beside: list[float] | None = None) -> str:
    """A bar for each class, the suspicious one marked; of many classes those of the highest scores.

    Args:
        scores: Of each class.
        names: Of the classes.
        suspect: The name of the one to mark.
        beside: Scores of another model, as a second, hatched bar.

    Returns:
        A data URI of an SVG, whose text stays text: the reader's fonts have more letters than matplotlib's.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = sorted(sorted(range(len(names)), key=lambda k: -scores[k])[:MOST_BARS])
    rows, buffer = np.arange(len(shown)), io.BytesIO()
    colours = [MARKED if names[k] == suspect else ORDINARY for k in shown]
    shift, height, inches = (0.0, 0.8, 0.24) if beside is None else (0.2, 0.4, 0.4)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "d3_hf"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure, axes = pyplot.subplots(figsize=(6, 1 + inches * len(shown)), layout="constrained")
        axes.barh(rows - shift, [scores[k] for k in shown], height, color=colours)
        if beside is not None:
            hatched = dict(color="white", edgecolor=colours, hatch="////", linewidth=0.8)
            axes.barh(rows + shift, [beside[k] for k in shown], height, **hatched)
        axes.set_yticks(rows, [drawn(names[k]) for k in shown])
        for label in axes.get_yticklabels():
            label.set_parse_math(False)  # a class may be called anything, `$\frac` too
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return _data_uri("svg+xml", buffer.getvalue())


def picture(pixels: np.ndarray) -> str:
    """A picture (3, H, W), enlarged where it is small, as a data URI of a PNG.

    Args:
        pixels: uint8; or floats, as they are if all lie in [0, 1], else stretched from the smallest to the largest.
    """
    if pixels.dtype != np.uint8:
        low, high = (0.0, 1.0) if pixels.min() >= 0 and pixels.max() <= 1 else (pixels.min(), pixels.max())
        pixels = np.rint(255 * (pixels - low) / (high - low)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    factor = max(1, ENLARGED // min(image.size))
    buffer = io.BytesIO()
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return _data_uri("png", buffer.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
