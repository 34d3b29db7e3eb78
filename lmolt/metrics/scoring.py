"""Every metric of both directions, with its interval and the convention it holds under (docs/metrics.md)."""

import numpy as np
import rdkit

from lmolt.files import known_as
from lmolt.metrics import caption, grounding, hallucination, meteor, molecule, properties, round_trip, statistics
from lmolt.metrics import fcd as chemnet
from lmolt.metrics.ngrams import characters, flatten
from lmolt.metrics.smiles import canonical
from lmolt.metrics.workers import Unfinished, in_processes
from lmolt.prompts import CAP2MOL, DIRECTIONS, MOL2CAP

METRICS = {
    MOL2CAP: (
        *caption.METRICS,
        *meteor.METRICS,
        *hallucination.CAPTION_METRICS,
        *grounding.CAPTION_METRICS,
        *properties.METRICS,
        *round_trip.CAPTION_METRICS,
    ),
    CAP2MOL: (
        *molecule.METRICS,
        *chemnet.METRICS,
        *hallucination.MOLECULE_METRICS,
        *grounding.MOLECULE_METRICS,
        *round_trip.MOLECULE_METRICS,
    ),
}


def score(
    direction: str,
    sources: list[str],
    references: list[str] | None,
    predictions: list[str],
    *,
    returned: list[str] | None = None,
    returned_by: str = "another model",
    known_molecules: list[str] | None = None,
    known_name: str = "the known molecules",
    text_tokenizer=None,
    nli_model: str | None = None,
    nltk_data: str | None = None,
    chrf_threshold: float = 0.3,
    delta_threshold: int = 5,
    property_tree: str | None = None,
    fcd: bool = True,
    cache_dir: str | None = None,
    n_shuffles: int = 99,
    n_bootstrap: int = 1000,
    seed: int = 0,
    num_workers: int | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Score one system's outputs of one direction.

    `sources`, `references`, `predictions`: n strings each, row i of one belongs to row i of the others; a prediction
    that is None or NaN counts as empty. Where `references` is None, what needs none is scored. `returned`: the outputs
    translated back by `returned_by`, for the round trip (round_trip.py). `known_molecules`: SMILES that a novel
    molecule is none of, called `known_name`. `text_tokenizer`: mol2cap's word pieces: a tokenizer's folder, a Hub id or
    a callable `str -> list[str]`; None is a plain word tokenizer, and each convention then says that the number is not
    comparable. `nli_model`: folder or Hub id of a sequence-classification model; `nltk_data`: a folder with
    `corpora/wordnet`. `chrf_threshold`, `delta_threshold`: a molecule wins with Chr-F above and |delta length| below
    them (paper, section 3.4). `property_tree`: folder with L+M-24's `nested_props.json` and, for held-out
    combinations, `train_withheld_combos.txt`. `cache_dir`: folder that keeps fingerprints and Gaussian fits of
    references between runs. `n_shuffles`: shuffles of the predictions that `*_grounding` compares with (grounding.py),
    0 for none. `num_workers`: processes for RDKit, default one a core.

    Returns `(metrics, per_example)`:
    `{"counts": {name: int}, "metrics": {key: {"value", "ci95": [lo, hi], "n", "convention"} | {"absent": reason}}}`
    (a `ci95` may be None, then `"ci95_absent"` says why; `*_grounding` have `grounding.summary` besides) and
    `{column: float array (n,), NaN where undefined}`, where columns with a `stat_` prefix are the sufficient statistics
    of corpus-level metrics, as `compare` needs them.

    `ValueError` on lists of different lengths, no rows, an empty reference, or in cap2mol a reference that is not a
    molecule (naming row and value); `FileNotFoundError` where `text_tokenizer` or `property_tree` is not there.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; use one of {', '.join(DIRECTIONS)}")
    sizes = {"sources": len(sources), "references": len(references or predictions), "predictions": len(predictions)}
    sizes |= {} if returned is None else {"returned": len(returned)}
    if len(set(sizes.values())) > 1 or not predictions:
        raise ValueError(f"every row needs a source, a reference and a prediction, found {sizes}")
    for row, reference in enumerate(references or (), 1):
        if not isinstance(reference, str) or not reference.strip():
            raise ValueError(f"row {row}: the reference is {reference!r}; every row needs one")
    n = len(predictions)
    missing = [not isinstance(p, str) for p in predictions]
    predictions = ["" if gone else p for p, gone in zip(predictions, missing, strict=True)]
    counts = {"empty_prediction": sum(not p.strip() for p in predictions), "missing_prediction": sum(missing)}
    counts |= {"no_reference": n} if references is None else {}
    settings = {"rdkit": rdkit.__version__, "n_shuffles": n_shuffles, "seed": seed}
    settings |= {"round_trip": returned_by, "known": known_name}
    found, shuffled, absent = {}, {}, {}  # metrics that are no functions of sums over rows; parts of others' entries
    if direction == MOL2CAP:
        settings |= {"pieces": caption.tokenizer_name(text_tokenizer), "nli_model": nli_model and known_as(nli_model)}
        per_example = hallucination.group_scores(sources, references, predictions, num_workers)
        per_example |= caption.oddities(predictions)
        if references is not None:
            of_references, shuffled, absent = _captions(
                references, predictions, text_tokenizer, nli_model, nltk_data, n_shuffles, seed
            )
            per_example |= of_references
        if references is not None and property_tree is not None:
            trees, columns = properties.score(references, predictions, property_tree, text_tokenizer, n_bootstrap, seed)
            per_example |= columns
            for key, (value, samples) in trees.items():
                found[key] = {"value": value, "ci95": statistics.interval(samples), "n": n}
        if returned is not None:
            per_example |= round_trip.of_molecules(sources, returned, num_workers)
    else:
        settings |= {"chrf_threshold": chrf_threshold, "delta_threshold": delta_threshold}
        if references is None:
            per_example = molecule.columns_alone(predictions, num_workers)
        else:
            per_example, shuffled, absent = _molecules(
                references, predictions, chrf_threshold, delta_threshold, cache_dir, n_shuffles, seed, num_workers
            )
            counts |= {
                f"doubled_backslash_{side}": sum("\\\\" in s for s in texts)
                for side, texts in (("reference", references), ("prediction", predictions))
            }
        valid = per_example["validity"] > 0
        counts["invalid_prediction"] = int((~valid).sum())
        per_example["uniqueness"] = molecule.uniqueness(predictions, valid)
        if known_molecules is not None:
            per_example["novelty"] = molecule.novelty(predictions, valid, known_molecules, num_workers)
        if references is not None:
            distances, reasons = _frechet_distances(references, predictions, valid, fcd, cache_dir, num_workers)
            found |= distances
            absent |= reasons
        if returned is not None:
            per_example |= round_trip.of_captions(sources, returned)
    side = "" if direction == MOL2CAP else "_prediction"
    odd = {key: int(column.sum()) for key, column in per_example.items() if key.startswith("count_")}
    counts |= {key.removeprefix("count_") + side: number for key, number in odd.items()}
    # Which rows a cause was found in is in scores.parquet.
    per_example = {key: column for key, column in per_example.items() if odd.get(key, 1)}
    own = statistics_of(direction, per_example)
    resampled = statistics.resample(own, n_bootstrap, seed)
    declared = {metric.key: metric for metric in METRICS[direction]}
    for key, (columns, value) in own.items():
        result = float(value(columns.sum(0)))
        if np.isnan(result):
            absent[key] = declared[key].undefined
            continue
        interval = statistics.confidence_interval(resampled[key])
        rows = n if declared[key].columns else int(columns[:, 1].sum())
        found[key] = {"value": result, "ci95": interval, "n": rows} | shuffled.get(key, {})
    metrics = {}
    categories = [key for key in found if "/" in key]
    for key in (*declared, *categories):
        metric = declared[key.partition("/")[0]]
        said = {"label": metric.label, "better": metric.better, "decimals": metric.decimals}
        if key in found:
            metrics[key] = said | found[key] | {"convention": metric.convention.format(**settings)}
        elif key in absent:
            metrics[key] = said | {"absent": absent[key]}
    return {"counts": counts, "metrics": metrics}, per_example


def statistics_of(direction: str, per_example: dict) -> dict[str, tuple]:
    """The statistics (columns and a function of their sums, see statistics.py) that per-example columns define."""
    found, shared = {}, {}
    for metric in METRICS[direction]:
        names = metric.columns or (metric.key,)
        if not all(name in per_example for name in names):
            continue
        if names not in shared:  # BLEU-2 and BLEU-4 are of the same sums
            shared[names] = np.stack([np.asarray(per_example[name], float) for name in names], 1)
        found[metric.key] = (shared[names], metric.value) if metric.columns else statistics.mean(shared[names][:, 0])
    return found


def compare(
    direction: str, scores_a: dict, scores_b: dict, *, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Paired bootstrap between two systems scored on the same rows.

    `scores_a`, `scores_b`: what `score` returned as `per_example` (or the same columns of two `scores.parquet`, rows
    in the same order). Returns `{key: {"difference": a - b, "ci95": [lo, hi], "p": two-sided p-value, "n"}}` for each
    metric both can be compared on: all but FCD, which has no sums over examples, and the tree-averaged properties,
    for which `property_example_*` stand in. The p-values are uncorrected: `statistics.holm` corrects a table's.

    `ValueError` where the two have different numbers of rows.
    """
    own, other = (statistics_of(direction, scores) for scores in (scores_a, scores_b))
    keys = [key for key in own if key in other]
    rows = {len(columns) for found in (own, other) for columns, _ in found.values()}
    if len(rows) != 1 or not keys:
        raise ValueError(f"two systems' scores of the same rows are needed, found columns of {sorted(rows)} rows")
    paired = {key: _difference(own[key], other[key]) for key in keys}
    results = {}
    for key, resampled in statistics.resample(paired, n_bootstrap, seed).items():
        if np.isnan(resampled.estimate) or not np.isfinite(resampled.values).any():
            continue
        results[key] = {
            "difference": resampled.estimate,
            "ci95": statistics.confidence_interval(resampled),
            "p": statistics.p_value(resampled.values),
            "n": rows.copy().pop(),
        }
    return results


def _difference(own: tuple, other: tuple) -> tuple:
    """The statistic a - b of two of the same rows."""
    split = own[0].shape[1]
    value = lambda sums: own[1](sums[..., :split]) - other[1](sums[..., split:])
    return np.concatenate([own[0], other[0]], 1), value


def _captions(references, predictions, tokenizer, nli_model, nltk_data, n_shuffles, seed):
    """`(per_example, parts of entries, reasons of what is absent)` of captions."""
    pieces, names = caption.tokenize([*references, *predictions], tokenizer, max_pieces=None)
    lengths = np.array([len(p) for p in caption.drop_special(pieces, names)], float).reshape(2, -1)
    cut = caption.drop_special([row[: caption.MAX_PIECES] for row in pieces], names)
    corpora = flatten(cut[: len(references)]), flatten(cut[len(references) :])
    per_example = {f"stat_bleu_{k}": v for k, v in caption.bleu_columns(*corpora).items()}
    per_example |= caption.rouge(references, predictions) | {"delta_len": lengths[1] - lengths[0]}
    absent, shuffled = {}, {}
    if len(references) > 1 and n_shuffles > 0:
        shuffles = grounding.permutations(len(references), n_shuffles, seed)
        columns = {key: per_example[f"stat_bleu_{key}"] for key in caption.BLEU_COLUMNS}
        extra, shuffled = grounding.of_captions(
            references, predictions, corpora, columns, per_example["rougeL"], shuffles
        )
        per_example |= extra
    else:
        absent |= {metric.key: metric.undefined for metric in grounding.CAPTION_METRICS}
    wordnet = None
    try:
        wordnet = meteor.WordNet(nltk_data)
    except FileNotFoundError as error:
        absent["meteor"] = str(error)
    per_example |= meteor.meteor(*corpora, names, wordnet)
    reason = "no NLI model given; name one with --nli_model, a folder or a Hub id"
    if nli_model is not None:
        try:
            scores = hallucination.entailment(references, predictions, nli_model)
            per_example |= dict(zip(("nli_entailment", "nli_win_rate"), scores, strict=True))
        except OSError as error:
            reason = f"NLI model {nli_model} could not be loaded: {str(error).strip().splitlines()[0]}"
    if "nli_entailment" not in per_example:
        absent |= {"nli_entailment": reason, "nli_win_rate": reason}
    return per_example, shuffled, absent


def _molecules(
    references, predictions, chrf_threshold, delta_threshold, cache_dir, n_shuffles, seed, num_workers
) -> tuple[dict, dict, dict]:
    """`(per_example, parts of entries, reasons of what is absent)` of molecules."""
    pairs = molecule.compare(references, predictions, cache_dir, num_workers)
    compared = molecule.columns(predictions, pairs)
    valid = compared["validity"] > 0
    delta = np.array([len(p) - len(r) for r, p in zip(references, predictions, strict=True)], float)
    per_example = {
        **_bleu_of_characters("bleu", references, predictions),
        **compared,
        "levenshtein": molecule.levenshtein(references, predictions),
        "chrf": hallucination.chrf(references, predictions),
        "delta_len": delta,
    }
    per_example["win_rate"] = hallucination.win(per_example["chrf"], delta, valid, chrf_threshold, delta_threshold)
    absent, shuffled = {}, {}
    if valid.sum() > 1 and n_shuffles > 0:
        environments = molecule.environments([pair for pair in pairs if isinstance(pair, molecule.Pair)])
        shuffles = grounding.permutations(int(valid.sum()), n_shuffles, seed)
        extra, shuffled = grounding.of_molecules(environments, per_example["morgan"][valid], shuffles)
        per_example["morgan_grounding"] = np.full(len(valid), np.nan)
        per_example["morgan_grounding"][valid] = extra
    else:
        absent |= {metric.key: metric.undefined for metric in grounding.MOLECULE_METRICS}
    if any("\\\\" in text for text in (*references, *predictions)):
        undoubled = [[s.replace("\\\\", "\\") for s in texts] for texts in (references, predictions)]
        per_example |= _bleu_of_characters("bleu_undoubled", *undoubled)
        per_example["levenshtein_undoubled"] = molecule.levenshtein(*undoubled)
        per_example["chrf_undoubled"] = hallucination.chrf(*undoubled)
    return per_example, shuffled, absent


def _bleu_of_characters(name: str, references: list[str], predictions: list[str]) -> dict[str, np.ndarray]:
    columns = caption.bleu_columns(characters(references), characters(predictions))
    return {f"stat_{name}_{key}": values for key, values in columns.items()}


def _frechet_distances(references, predictions, valid, wanted: bool, cache_dir, num_workers) -> tuple[dict, dict]:
    """`(entries, reasons of what is absent)` of FCD in both conventions."""
    if not wanted:
        return {}, dict.fromkeys(chemnet.RULES, "not asked for")
    ours = [p for p, ok in zip(predictions, valid, strict=True) if ok]
    both = in_processes(canonical, [*references, *ours], num_workers)
    sides = [
        [s for s in side if s and not isinstance(s, Unfinished)] for side in (both[: len(valid)], both[len(valid) :])
    ]
    if min(map(len, sides)) < 2:
        reason = f"needs two valid molecules on each side, found {len(sides[0])} and {len(sides[1])}"
        return {}, dict.fromkeys(chemnet.RULES, reason)
    why = "a resample repeats molecules, which biases a covariance and with it the distance"
    return {
        key: {
            "value": chemnet.distance(*sides, rule, cache_dir),
            "ci95": None,
            "ci95_absent": why,
            "n": len(sides[1]),
        }
        for key, rule in chemnet.RULES.items()
    }, {}
