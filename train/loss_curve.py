"""A picture of a run's loss."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from avid_pipeline.train.run_log import read_metrics


def draw_loss_curve(folder: Path) -> Path | None:
    """Draw ``loss.png`` from a run's ``metrics.jsonl``; None where nothing has been logged."""
    entries = [entry for entry in read_metrics(folder) if "loss/total" in entry]
    if not entries:
        return None
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = np.array([entry["step"] for entry in entries])
    names = sorted({name for entry in entries for name in entry if name.startswith("loss/")})
    for name in names:
        values = np.array([entry.get(name, np.nan) for entry in entries])
        total = name == "loss/total"
        axes.plot(
            steps,
            values,
            label=name.removeprefix("loss/").replace("_", " "),
            linewidth=2.2 if total else 1.0,
            color="black" if total else None,
            alpha=1.0 if total else 0.7,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(f"Training loss, {int(steps[-1])} steps")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    partial = folder / "loss.png.partial"
    figure.savefig(partial, format="png")
    partial.replace(path)
    return path
