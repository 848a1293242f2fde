"""Draws how FasterViT and HAT-Net attend: windows, carriers and averages of a small map."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

WINDOWS, TOKENS, CARRIERS = 3, 4, 2  # along a side: windows, tokens and carriers of a window
SIDE = WINDOWS * TOKENS
ASKING = (5, 6)  # column and row of the token whose attention is shown
BLUE, ORANGE, GREY = '#4c78a8', '#f58518', '#d9d9d9'


def cells(axis: Any, n: int, color: str, alpha: float) -> None:
    """A grid of n x n cells over the map."""
    size = SIDE / n
    for i in range(n):
        for j in range(n):
            axis.add_patch(
                Rectangle(
                    (j * size, i * size), size, size, facecolor=color, edgecolor='white',
                    linewidth=0.8, alpha=alpha,
                )
            )  # fmt: skip


def windows(axis: Any) -> None:
    """The borders of the windows."""
    for i in range(WINDOWS + 1):
        axis.plot([i * TOKENS] * 2, [0, SIDE], color='black', linewidth=1.4)
        axis.plot([0, SIDE], [i * TOKENS] * 2, color='black', linewidth=1.4)


def mark(axis: Any, x: float, y: float, size: float, color: str) -> None:
    axis.add_patch(Rectangle((x, y), size, size, facecolor=color, edgecolor='black', linewidth=1))


def arrows(axis: Any, starts: list[tuple[float, float]], end: tuple[float, float]) -> None:
    """Arrows from what is looked at to what asks."""
    for start in starts:
        axis.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle='-|>', mutation_scale=7, color='black', linewidth=0.7,
                alpha=0.7, shrinkA=0, shrinkB=2, connectionstyle='arc3,rad=0.08',
            )
        )  # fmt: skip


def panel(axis: Any, title: str) -> None:
    axis.set(xlim=(-0.3, SIDE + 0.3), ylim=(SIDE + 0.3, -0.3), aspect='equal')
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)


def own_window(axis: Any, color: str = BLUE) -> None:
    """The tokens of the window of the token that asks, which is marked."""
    left, top = (n // TOKENS * TOKENS for n in ASKING)
    for i in range(TOKENS):
        for j in range(TOKENS):
            axis.add_patch(
                Rectangle(
                    (left + j, top + i), 1, 1, facecolor=color, edgecolor='white', linewidth=0.8
                )
            )
    mark(axis, *ASKING, size=1, color='white')


def fastervit(axes: Any) -> None:
    """The three steps of a block with carriers."""
    size = TOKENS / CARRIERS
    n = WINDOWS * CARRIERS
    centres = [((j + 0.5) * size, (i + 0.5) * size) for i in range(n) for j in range(n)]

    panel(axes[0], 'FasterViT: a map in windows,\neach with 2 x 2 carriers (orange)')
    cells(axes[0], SIDE, GREY, 1)
    windows(axes[0])
    for x, y in centres:
        mark(axes[0], x - 0.35, y - 0.35, 0.7, ORANGE)

    panel(axes[1], '1. The carriers of all windows\nattend to each other')
    cells(axes[1], n, ORANGE, 0.75)
    end = centres[14]
    arrows(axes[1], [centre for centre in centres if centre != end], end)

    panel(axes[2], '2. The tokens of a window attend to it\nand to its carriers')
    cells(axes[2], SIDE, GREY, 1)
    own_window(axes[2])
    windows(axes[2])
    left, top = (n // TOKENS * TOKENS for n in ASKING)
    own = [(left + x, top + y) for x, y in ((1, 1), (3, 1), (1, 3), (3, 3))]
    for x, y in own:
        mark(axes[2], x - 0.35, y - 0.35, 0.7, ORANGE)
    arrows(axes[2], own, (ASKING[0] + 0.5, ASKING[1] + 0.5))


def hat_net(axes: Any) -> None:
    """The two steps of H-MHSA."""
    panel(axes[0], 'HAT-Net: the same map in windows')
    cells(axes[0], SIDE, GREY, 1)
    windows(axes[0])

    panel(axes[1], '1. The tokens of a window\nattend to each other')
    cells(axes[1], SIDE, GREY, 1)
    own_window(axes[1])
    windows(axes[1])

    panel(axes[2], '2. Every token attends to the averages\nof all squares of the result')
    n = SIDE // 3
    cells(axes[2], n, ORANGE, 0.75)
    size = SIDE / n
    centres = [((j + 0.5) * size, (i + 0.5) * size) for i in range(n) for j in range(n)]
    mark(axes[2], *ASKING, size=1, color='white')
    arrows(axes[2], centres, (ASKING[0] + 0.5, ASKING[1] + 0.5))


def main(argv: list[str] | None = None) -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('docs/images/architecture.svg'))
    args = parser.parse_args(argv)
    # The same file every time: no date, no random names.
    mpl.rcParams.update({'svg.hashsalt': 'hat_mm', 'svg.fonttype': 'none'})
    figure = Figure(figsize=(9, 6.4), layout='constrained')
    axes = figure.subplots(2, 3)
    fastervit(axes[0])
    hat_net(axes[1])
    figure.savefig(args.out, metadata={'Date': None}, facecolor='white')


if __name__ == '__main__':
    main()
