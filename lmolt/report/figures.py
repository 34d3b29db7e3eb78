"""The paper's figures: distributions (1), cross win rates (2), case studies of molecules (3) and captions (4).

Every function returns PNG bytes. Colours are Okabe and Ito's, which the colour-blind can tell apart, and systems
differ in line style too, so that the figures survive a black-and-white printer.
"""

import io
import re
import warnings
from functools import cache

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, or opened where there is one
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import FontProperties

from lmolt.data.negatives import SIMILARITIES
from lmolt.report.drawing import CELL, draw

warnings.filterwarnings("ignore", "Glyph .* missing from font")  # an output may hold any character; a box stands for it

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARK = "#B84A00"  # what differs from the reference
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 200,
}


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, bbox_inches="tight", pad_inches=0.05, facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def distributions(panels: list[tuple[str, str, dict[str, np.ndarray]]]) -> bytes:
    """Figure 1: one panel a measure `(title, axis label, {system: per-example values (n,)})`, systems overlaid.

    Histograms share their bins, heights are shares of examples, triangles mark means. Lengths have long tails: the
    axis spans the middle 98 % of all systems' values together, and what lies outside is counted in the end bins.
    """
    systems = list(dict.fromkeys(name for _, _, values in panels for name in values))
    look = lambda name: {"color": COLOURS[systems.index(name) % 8], "linestyle": LINES[systems.index(name) % 8]}
    columns = 3 if len(panels) == 3 else min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=((2.8 if columns == 3 else 3.5) * columns, 2.3 * rows + 0.4),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, label, by_system) in zip(axes.flat, panels, strict=False):
            by_system = {name: np.asarray(v, float)[np.isfinite(v)] for name, v in by_system.items()}
            edges, outside = _bins(np.concatenate(list(by_system.values())))
            for name, values in by_system.items():
                inside = np.clip(values, edges[0], edges[-1])
                shares = 100 * np.histogram(inside, edges)[0] / len(values)
                axis.stairs(shares, edges, linewidth=1.3, **look(name))
                mean = np.clip(values.mean(), edges[0], edges[-1])
                above = {"transform": axis.get_xaxis_transform(), "clip_on": False, "markersize": 4}
                axis.plot([mean], [1.025], marker="v", markeredgewidth=0, **(look(name) | {"linestyle": ""}), **above)
            if edges[0] < 0 < edges[-1]:
                axis.axvline(0, color="#999999", linewidth=0.7, zorder=0)
            if outside:
                label += f"\n{100 * outside:.1f} % beyond the axis, in its end bins"
            axis.set(xlabel=label, ylabel="examples (%)", xlim=(edges[0], edges[-1]))
            axis.set_title(title, pad=9)
            axis.set_ylim(bottom=0)
        handles = [plt.Line2D([], [], linewidth=1.4, **look(name)) for name in systems]
        names = [_shorten(name, 40) for name in systems]
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(systems), 4), handlelength=2.6)
        return _png(figure)


def _bins(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Edges of about 25 shared bins, and the share of values beyond them."""
    if values.min() >= 0 and values.max() <= 1:
        return np.linspace(0, 1, 26), 0.0
    low, high = np.percentile(values, [1, 99])
    width = max(1, int(np.ceil((high - low) / 25)))  # lengths are whole numbers: whole bins, one centred on zero
    edges = np.arange(np.floor(low / width) - 0.5, np.ceil(high / width) + 1.5) * width
    return edges, float(np.mean((values < edges[0]) | (values > edges[-1])))


def win_rates(panels: list[tuple[str, list[str], np.ndarray]]) -> bytes:
    """Figure 2: `(title, systems, wins (S, S))`, wins[a, b] = share of examples on which a scores above b."""
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        size = max(len(systems) for _, systems, _ in panels)
        side = 0.5 * size + 1.7
        figure, axes = plt.subplots(
            1, len(panels), figsize=(side * len(panels) + 0.6, side), squeeze=False, layout="constrained"
        )
        for axis, (title, systems, wins) in zip(axes[0], panels, strict=True):
            shown = np.where(np.eye(len(systems), dtype=bool), np.nan, 100 * wins)
            image = axis.imshow(shown, cmap="Blues", vmin=0, vmax=100)
            for i, j in zip(*np.nonzero(~np.isnan(shown)), strict=True):
                ink = "white" if shown[i, j] > 55 else "black"
                axis.text(j, i, f"{shown[i, j]:.0f}", ha="center", va="center", color=ink)
            short = [_shorten(name, 16) for name in systems]
            axis.set_xticks(range(len(systems)), short, rotation=35, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(systems)), short)
            axis.set(title=title, xlabel="… scores above this one", ylabel="this system …")
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
        bar = figure.colorbar(image, ax=list(axes[0]), shrink=0.75, pad=0.03)
        bar.set_label("examples won (%)")
        bar.outline.set_visible(False)
        return _png(figure)


def molecule_cases(cases: list[dict]) -> bytes:
    """Figure 3: a row a case `{"label", "reference": SMILES, "outputs": {system: (SMILES, note)}}`, drawn side by side.

    Outputs are laid over the largest substructure they share with the reference, and atoms outside it are marked.
    """
    systems = list(cases[0]["outputs"])
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        columns = len(systems) + 1
        figure, axes = plt.subplots(
            len(cases),
            columns,
            figsize=(2.15 * columns, 1.85 * len(cases)),
            squeeze=False,
            layout="constrained",
        )
        for row, (line, case) in enumerate(zip(axes, cases, strict=True)):
            _show(line[0], case["reference"], None, case["label"])
            for axis, (smiles, note) in zip(line[1:], case["outputs"].values(), strict=True):
                _show(axis, smiles, case["reference"], note)
            if row == 0:
                for axis, name in zip(line, ["reference", *(_shorten(s, 26) for s in systems)], strict=True):
                    axis.set_title(name, fontweight="bold")
        return _png(figure)


def _show(axis, smiles: str, reference: str | None, note: str) -> None:
    if png := draw(smiles, reference):
        axis.imshow(plt.imread(io.BytesIO(png)))
    else:
        axis.set(xlim=(0, CELL[0]), ylim=(CELL[1], 0), aspect="equal")
        axis.text(
            CELL[0] / 2,
            CELL[1] / 2,
            "invalid SMILES" if smiles.strip() else "empty output",
            ha="center",
            va="center",
            color=MARK,
        )
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color("#CCCCCC")
    axis.set_xlabel(note, fontsize=7, labelpad=2)


def unsupported(reference: str, prediction: str) -> list[tuple[str, bool]]:
    """The words of `prediction`, each with whether `reference` lacks it anywhere; case and punctuation aside.

    Order doesn't count: captions list properties, and a list in another order says the same.
    """
    plain = lambda word: re.sub(r"^\W+|\W+$", "", word.lower())
    known = {plain(word) for word in reference.split()}
    return [(word, plain(word) not in known) for word in prediction.split()]


def caption_cases(cases: list[dict], words: int = 80) -> bytes:
    """Figure 4: a block a case `{"label", "molecule": SMILES, "reference", "outputs": {system: (caption, note)}}`.

    The molecule is drawn beside its captions; in each output, words that the reference lacks are underlined and
    coloured. Captions longer than `words` words are cut, with an ellipsis.
    """
    width, dpi, text_left, size = 7.4, 200, 2.2, 7.0  # inches, pixels an inch, inches, points
    line_height = 1.38 * size / 72
    font, bold = FontProperties(size=size), FontProperties(size=size, weight="bold")
    figure = plt.figure(figsize=(width, 1), dpi=dpi)
    renderer = figure.canvas.get_renderer()

    @cache
    def measure(word: str, heavy: bool = False) -> float:  # inches
        return renderer.get_text_width_height_descent(word, bold if heavy else font, False)[0] / dpi

    space, items, y = (
        measure("a a") - measure("aa"),
        [],
        0.08,
    )  # items: (x, y from the top, text, kind), inches
    pictures, rules = [], []
    for case in cases:
        top = y
        blocks = [("reference", case["label"], unsupported(case["reference"], case["reference"]))]
        blocks += [(name, note, unsupported(case["reference"], text)) for name, (text, note) in case["outputs"].items()]
        for name, note, marked in blocks:
            name = _shorten(name, 30)
            items.append((text_left, y, name, "name"))
            items.append((text_left + measure(name, True) + 2 * space, y, note, "note"))
            x, y = text_left, y + line_height
            for word, lacking in (marked[:words] + [("…", False)] * (len(marked) > words)) or [("(empty)", False)]:
                word = _shorten(word, 60)
                if x > text_left and x + measure(word) > width - 0.05:
                    x, y = text_left, y + line_height
                items.append((x, y, word, "lacking" if lacking else ""))
                x += measure(word) + space
            y += 1.35 * line_height
        y = max(y, top + 1.5)
        pictures.append((case["molecule"], top))
        rules.append(y - 0.02)
        y += 0.12
    plt.close(figure)

    with plt.rc_context(_STYLE | {"axes.grid": False}):
        figure = plt.figure(figsize=(width, y))
        axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(y, 0))
        axis.axis("off")
        for x, at, text, kind in items:
            colour = {"lacking": MARK, "note": "#555555"}.get(kind, "black")
            axis.text(
                x,
                at,
                text,
                color=colour,
                va="top",
                fontproperties=bold if kind == "name" else font,
                parse_math=False,
            )
            if kind == "lacking":
                axis.plot([x, x + measure(text)], [at + 0.112] * 2, color=MARK, linewidth=0.7, solid_capstyle="butt")
        for smiles, top in pictures:
            if png := draw(smiles):
                axis.imshow(plt.imread(io.BytesIO(png)), extent=(0.05, 2.05, top + 2 * CELL[1] / CELL[0], top))
        for at in rules[:-1]:
            axis.plot([0.05, width - 0.05], [at, at], color="#BBBBBB", linewidth=0.6)
        axis.set(xlim=(0, width), ylim=(y, 0), aspect="auto")
        return _png(figure)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def triples_figure(triples: list[dict], similarities: dict[str, list[float]]) -> bytes:
    """PNG: by direction, the lengths of preferred and dis-preferred outputs, and how similar they are."""
    panels = []
    for direction, close in similarities.items():
        if mine := [triple for triple in triples if triple["direction"] == direction]:
            columns = {"preferred": "chosen", "dis-preferred": "rejected"}
            lengths = {name: np.array([len(triple[c]) for triple in mine]) for name, c in columns.items()}
            panels.append((f"{direction}: length of outputs", "characters", lengths))
            if not np.isnan(close).all():
                label = f"{SIMILARITIES[direction]} to the preferred output"
                panels.append((f"{direction}: similarity", label, {"dis-preferred": np.array(close)}))
    return distributions(panels)
