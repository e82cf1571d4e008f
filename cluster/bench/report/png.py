"""Charts as PNG files, drawn by matplotlib, which is in the extra `bench`. Knows charts and nothing of a benchmark."""

from collections.abc import Sequence
from pathlib import Path

from cluster.bench.report.charts import Chart
from cluster.bench.report.svg import COLORS
from workers.errors import ConfigError


def check_matplotlib() -> None:
    """Before a long benchmark, not after it. Raises ConfigError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            "--plots needs matplotlib.", remedy="Install it with: pip install 'tramontane[bench]'.", param="--plots"
        ) from e


def write_pngs(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """One file for each chart; the folder is made. Raises OSError."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for i, line in enumerate(s for s in chart.series if s.xs):
            axes.plot(
                line.xs, line.ys, label=line.name, color=COLORS[i % len(COLORS)], marker="" if chart.is_log else "o"
            )
        axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label, ylim=(0, None))
        if chart.is_log:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        path = folder / f"{chart.key}.png"
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths
