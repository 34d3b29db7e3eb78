"""L+M-24's property scorers (Edwards et al. 2024): which properties a caption names, averaged over their tree.

A property counts as named where its name's word pieces occur in a row in the lower-cased caption's.
"""

import ast
import json
from pathlib import Path

import numpy as np

from lmolt.metrics.caption import word_pieces
from lmolt.metrics.metric import Metric
from lmolt.metrics.statistics import resampled_sums

_COMBINATIONS = ("train_withheld_combos.txt", "withheld_combos.txt")


def read_tree(folder: str | Path) -> list[str]:
    """Property paths `category__subcategory__name` of `folder`/nested_props.json.

    `FileNotFoundError` where it is not there.
    """
    path = Path(folder) / "nested_props.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is in L+M-24's additional_data.zip")

    def walk(node: dict) -> list[str]:
        return [
            f"{key}__{below}"
            for key, children in node.items()
            for child in children
            for below in ([child] if isinstance(child, str) else walk(child))
        ]

    return list(dict.fromkeys(walk(json.loads(path.read_text(encoding="utf-8")))))


def read_combinations(folder: str | Path) -> list[tuple[str, str]] | None:
    """Held-out pairs of properties, one `('a', 'b')<tab>count` a line, or None where the folder has no such file."""
    path = next((Path(folder) / name for name in _COMBINATIONS if (Path(folder) / name).is_file()), None)
    if path is None:
        return None
    return [ast.literal_eval(line.split("\t")[0]) for line in path.read_text(encoding="utf-8").splitlines() if line]


def named(captions: list[str], names: list[str], tokenizer) -> np.ndarray:
    """Whether each caption names each property, `(n, len(names))` bool."""
    lowered = [text.lower() for text in [*captions, *names]]
    rows, _ = word_pieces(lowered, tokenizer, max_pieces=None)
    texts, wanted = rows[: len(captions)], rows[len(captions) :]
    by_first = {}
    for column, pieces in enumerate(wanted):
        by_first.setdefault(pieces[0] if pieces else None, []).append((pieces, column))
    found = np.zeros((len(captions), len(names)), bool)
    found[:, [column for _, column in by_first.pop(None, [])]] = True  # nothing is contained in everything
    for row, text in enumerate(texts):
        for at, piece in enumerate(text):
            for pieces, column in by_first.get(piece, ()):
                if text[at : at + len(pieces)] == pieces:
                    found[row, column] = True
    return found


def score(references, predictions, folder, tokenizer, n_bootstrap: int, seed: int) -> tuple[dict, dict]:
    """`(metrics, per_example)` of the tree-averaged precision, recall, F1 and accuracy, and of held-out combinations.

    `metrics`: `{key: (value, bootstrap values (n_bootstrap,))}`, NaN where undefined; keys
    `property_f1` and the like overall, `property_f1/Biomedical/antis` a category, `combination_f1`.
    """
    paths = read_tree(folder)
    combinations = read_combinations(folder)
    names = list(
        dict.fromkeys([p.split("__")[-1] for p in paths] + [name for pair in combinations or () for name in pair])
    )
    truth, said = (named(captions, names, tokenizer) for captions in (references, predictions))
    hit, surplus, missed = truth & said, ~truth & said, truth & ~said
    per_example = {
        "property_example_f1": _per_example(2 * hit.sum(1), 2 * hit.sum(1) + surplus.sum(1) + missed.sum(1)),
        "property_example_precision": _per_example(hit.sum(1), said.sum(1)),
        "property_example_recall": _per_example(hit.sum(1), truth.sum(1)),
    }
    number = {name: i for i, name in enumerate(names)}
    active = np.flatnonzero((truth | said).any(0))
    columns = np.concatenate([m[:, active] for m in (hit, surplus, missed)], 1).astype(float)
    values, samples = columns.sum(0)[None], resampled_sums(columns, n_bootstrap, seed)
    leaf = np.array([number[p.split("__")[-1]] for p in paths])
    metrics = {}
    for key, ratio in _RATIOS.items():
        both = [_spread(ratio, sums, active, len(names), len(references))[:, leaf] for sums in (values, samples)]
        for suffix, empty in (("", 1.0), ("_empty0", 0.0)):
            nodes = [_tree_means(paths, leaves, empty) for leaves in both]
            # The old code's categories differ only where empty, so they are given for the final code alone.
            for node in nodes[0] if empty else [""]:
                name = f"property_{key}{suffix}" + (f"/{node.replace('__', '/')}" if node else "")
                metrics[name] = (float(nodes[0][node][0]), nodes[1][node])
    if combinations:
        a, b = (np.array([number[pair[k]] for pair in combinations]) for k in range(2))
        true_pair, said_pair = (m[:, a] & m[:, b] for m in (truth, said))
        for key, part in (
            ("tp", true_pair & said_pair),
            ("fp", ~true_pair & said_pair),
            ("fn", true_pair & ~said_pair),
        ):
            per_example[f"stat_combination_{key}"] = part.sum(1).astype(float)
        per_example["stat_combination_pairs"] = np.full(len(references), float(len(combinations)))
    return metrics, per_example


COMBINATION_COLUMNS = [f"stat_combination_{key}" for key in ("tp", "fp", "fn", "pairs")]
_RATIOS = {
    "precision": lambda tp, fp, fn, n: (tp, tp + fp),
    "recall": lambda tp, fp, fn, n: (tp, tp + fn),
    "f1": lambda tp, fp, fn, n: (2 * tp, 2 * tp + fp + fn),
    "accuracy": lambda tp, fp, fn, n: (n - fp - fn, n + 0 * tp),
}


def ratio_of_sums(key: str, sums: np.ndarray) -> np.ndarray:
    """Precision, recall, F1 or accuracy from summed `COMBINATION_COLUMNS`, `(..., 4) -> (...,)`; NaN for 0 / 0."""
    return _divide(*_RATIOS[key](*np.moveaxis(sums, -1, 0)))


def _divide(part, whole) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _per_example(part, whole) -> np.ndarray:
    return _divide(part.astype(float), whole)


def _spread(ratio, sums, active, n_names: int, n: int) -> np.ndarray:
    """A ratio per property name, `(B, n_names)`, from sums `(B, 3 * len(active))`; names nobody uses have none."""
    tp, fp, fn = np.zeros((3, len(sums), n_names))
    for part, counts in zip((tp, fp, fn), np.split(sums, 3, 1), strict=True):
        part[:, active] = counts
    return _divide(*ratio(tp, fp, fn, n))


def _tree_means(paths: list[str], leaves: np.ndarray, empty: float) -> dict[str, np.ndarray]:
    """Mean of each node's defined children, `(B,)` a node; "" is the root. A node without any counts as `empty`.

    `leaves`: `(B, len(paths))`, NaN where undefined.
    """
    children = {}
    for column, path in enumerate(paths):
        parts = path.split("__")
        for depth in range(1, len(parts)):
            children.setdefault("__".join(parts[: depth - 1]), {})["__".join(parts[:depth])] = None
        children.setdefault("__".join(parts[:-1]), {})[path] = column
    means = {}
    for node in sorted(children, key=lambda node: -node.count("__") - bool(node)):
        own = [leaves[:, c] if c is not None else means[name] for name, c in children[node].items()]
        stacked = np.stack(own, 1)
        defined = ~np.isnan(stacked)
        total, count = np.where(defined, stacked, 0).sum(1), defined.sum(1)
        means[node] = np.where(count > 0, total / np.maximum(count, 1), empty)
    return means


_NAMED = "property names as word pieces ({pieces}) within the caption's"
_TREE = "L+M-24 tree average, a category nobody names counts {empty}; {named}"
_RATIO_NAMES = {"precision": "precision", "recall": "recall", "f1": "F1", "accuracy": "accuracy"}
_NEVER_NAMED = {
    "precision": "no prediction names a held-out pair",
    "recall": "no reference names a held-out pair",
    "f1": "nobody names a held-out pair",
    "accuracy": "there is no held-out pair",
}
METRICS = (
    *(
        Metric(
            key=f"property_example_{key}",
            label=f"Properties a caption, {_RATIO_NAMES[key]}",
            better=1,
            convention=f"per caption, {_NAMED}",
            undefined="no caption names a property",
        )
        for key in ("precision", "recall", "f1")
    ),
    *(
        Metric(
            key=f"property_{key}{suffix}",
            label=f"Properties, {_RATIO_NAMES[key]}" + " (old code)" * bool(suffix),
            better=1,
            convention=_TREE.format(empty=empty, named=_NAMED),
        )
        for key in _RATIOS
        for suffix, empty in (("", 1.0), ("_empty0", 0.0))
    ),
    *(
        Metric(
            key=f"combination_{key}",
            label=f"Held-out pairs, {_RATIO_NAMES[key]}",
            better=1,
            convention=f"held-out pairs, both named; {_NAMED}",
            undefined=_NEVER_NAMED[key],
            columns=tuple(COMBINATION_COLUMNS),
            value=lambda sums, key=key: ratio_of_sums(key, sums),
        )
        for key in _RATIOS
    ),
)
