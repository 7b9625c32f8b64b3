"""A picture of a simulation. matplotlib is imported only when one is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dadi.errors import ConfigError, MissingFeature
from dadi.simulate.result import Result


def ready() -> None:
    """Raise MissingFeature if nothing can be drawn: before the simulation, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingFeature("--plot needs matplotlib, which is not installed", hint="pip install matplotlib")


def draw(result: Result, path: Path) -> None:
    """Draw when nodes had their startup bytes, against the bounds, and who sent how much. The suffix says the format.

    Raises MissingFeature without matplotlib, ConfigError if the file cannot be written.
    """
    ready()
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    s, times = result.settings, result.times
    left.step(times, [(place + 1) / s.nodes for place in range(len(times))], where="post", color="#1a7f5a")
    for seconds, colour, name in (
        (result.bounds.receiving, "#9aa0a6", "links"),
        (result.floor, "#b3261e", "no scheme can beat this"),
        (result.tree, "#5f6368", "tree, by the formula"),
    ):
        left.axvline(seconds, linestyle="--", linewidth=1, color=colour, label=f"{name}: {seconds:.3f} s")
    left.set_xlim(left=0)
    left.set_ylim(0, 1.02)
    left.set_xlabel("seconds")
    left.set_ylabel("nodes that have their startup bytes")
    left.legend(loc="upper left", fontsize=8)
    names = ["registry", "superpeers", "into a rack,\nmean", "into a rack,\nmost", "by a node,\nmost"]
    values = [result.registry_copies, result.superpeer_copies, result.rack_copies.mean, result.rack_copies.most,
              result.node_copies.most]  # fmt: skip
    right.bar(names, values, color="#1a7f5a", width=0.6)
    for at, value in enumerate(values):
        right.text(at, value, f"{value:.2f}", ha="center", va="bottom", fontsize=9)
    right.set_ylabel("copies of the startup set")
    right.tick_params(axis="x", labelsize=8)
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    faults = "".join(f", {share:.0%} {what}" for share, what in ((s.fail, "fail"), (s.slow, "slow"), (s.lie, "lie"))
                     if share)  # fmt: skip
    figure.suptitle(f"{s.nodes:,} nodes, {s.startup_size / 1e6:.0f} MB at start{faults}", fontsize=10)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot draw {path}: {error}") from None
    finally:
        pyplot.close(figure)
