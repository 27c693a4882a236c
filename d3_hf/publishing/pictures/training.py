"""Clean loss and distance while training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing import AFTER, WRONG, new_figure, save

PANELS = {"clean_loss": "clean loss (nats)", "distance": "relative distance"}
LEAST = 3  # points of a curve


def logged(log_history: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """What ``trainer_state.json`` holds of the two, as (update, value); without what was logged fewer than `LEAST` times."""
    curves = {key: [(entry["step"], entry[key]) for entry in log_history if key in entry] for key in PANELS}
    return {key: points for key, points in curves.items() if len(points) >= LEAST}


def draw_training(log_history: Sequence[dict[str, Any]], epsilon: float | None, file: Path) -> None:
    """Draw a curve for each of `logged`.

    Args:
        log_history: Of the trainer's state.
        epsilon: Clean loss that costs nothing, as a dashed line; None where the method has none.
        file: Where the picture goes.
    """
    curves = logged(log_history)
    figure = new_figure(7, 1 + 1.9 * len(curves))
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (key, points) in zip(panels, curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color=AFTER, marker="o", markersize=3)
        if key == "clean_loss" and epsilon:
            axes.axhline(epsilon, color=WRONG, linestyle="--", linewidth=1, label=f"epsilon, {epsilon:g}")
            axes.legend(frameon=False)
        axes.set_ylabel(PANELS[key])
        axes.set_ylim(0, 1.08 * max(value for _, value in points) or 1)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("update")
    save(figure, file)
