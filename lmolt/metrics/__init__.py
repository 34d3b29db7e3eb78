"""Every metric of both directions, with its interval and the convention it holds under (docs/metrics.md)."""

import importlib.metadata

import numpy as np

from lmolt.metrics import caption, grounding, statistics
from lmolt.metrics.ngrams import characters, flatten
from lmolt.prompts import DIRECTIONS, MOL2CAP

_MEANS = {
    "mol2cap": (
        *("rouge1", "rouge2", "rougeL", "meteor", "delta_len", "nli_entailment", "nli_win_rate"),
        *("group_hallucination", "group_hallucination_reference", "group_unclaimed", "group_missed"),
        *("property_example_precision", "property_example_recall", "property_example_f1", "rougeL_grounding"),
    ),
    "cap2mol": (
        *("exact_match", "levenshtein", "validity", "maccs", "rdk", "morgan", "chrf", "delta_len", "win_rate"),
        *("uniqueness", "canonical_match", "canonical_match_no_stereo", "scaffold_match"),
        *("levenshtein_undoubled", "chrf_undoubled", "morgan_grounding"),
    ),
}
_FINGERPRINTS = ("maccs", "rdk", "morgan")
_UNDEFINED = {
    **dict.fromkeys((*_FINGERPRINTS, "uniqueness"), "no prediction is valid"),
    "scaffold_match": "no reference has a ring",
    "group_hallucination": "no prediction names one of the functional groups",
    "group_hallucination_reference": "no reference names one of the functional groups",
    "group_missed": "no reference names one of the functional groups that its molecule has",
    "group_unclaimed": "no molecule has one of the functional groups",
    "combination_precision": "no prediction names a held-out pair",
    "combination_recall": "no reference names a held-out pair",
}
_NO_SHUFFLES = "needs two rows to shuffle, and n_shuffles above 0"
_COMBINATION = ("precision", "recall", "f1", "accuracy")


def score(
    direction: str,
    sources: list[str],
    references: list[str],
    predictions: list[str],
    *,
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
    that is None or NaN counts as empty. `text_tokenizer`: mol2cap's word pieces: a tokenizer's folder, a Hub id or a
    callable `str -> list[str]`; None is a plain word tokenizer, and each convention then says that the number is not
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
    sizes = {"sources": len(sources), "references": len(references), "predictions": len(predictions)}
    if len(set(sizes.values())) > 1 or not references:
        raise ValueError(f"every row needs a source, a reference and a prediction, found {sizes}")
    for row, reference in enumerate(references, 1):
        if not isinstance(reference, str) or not reference.strip():
            raise ValueError(f"row {row}: the reference is {reference!r}; every row needs one")
    missing = [not isinstance(p, str) for p in predictions]
    predictions = ["" if gone else p for p, gone in zip(predictions, missing, strict=True)]
    counts = {"empty_prediction": sum(not p.strip() for p in predictions), "missing_prediction": sum(missing)}
    if direction == MOL2CAP:
        absent, conventions, per_example, shuffled = _captions(
            sources, references, predictions, text_tokenizer, nli_model, nltk_data, n_shuffles, seed, num_workers
        )
    else:
        absent, conventions, per_example, shuffled = _molecules(
            *(references, predictions, counts, chrf_threshold, delta_threshold, cache_dir),
            *(n_shuffles, seed, num_workers),
        )
    metrics = {}
    if direction == MOL2CAP and property_tree is not None:
        from lmolt.metrics import properties

        trees, extra = properties.score(references, predictions, property_tree, text_tokenizer, n_bootstrap, seed)
        per_example |= extra
        names = f"property names as word pieces ({_tokenizer_name(text_tokenizer)}) within the caption's"
        conventions |= {f"property_example_{k}": f"per caption, {names}" for k in ("precision", "recall", "f1")}
        conventions |= {f"combination_{k}": f"held-out pairs, both named; {names}" for k in _COMBINATION}
        for key, (value, samples, empty) in trees.items():
            interval = statistics.interval(samples)
            convention = f"L+M-24 tree average, a category nobody names counts {empty}; {names}"
            metrics[key] = {"value": value, "ci95": interval, "n": len(references), "convention": convention}
    own = statistics_of(direction, per_example)
    samples = statistics.bootstrap(own, n_bootstrap, seed)
    for key, (columns, value) in own.items():
        result = float(value(columns.sum(0)))
        if np.isnan(result):
            absent[key] = _UNDEFINED.get(key, f"undefined in all {len(references)} rows")
            continue
        defined = int(columns[:, 1].sum()) if key in _MEANS[direction] else len(references)
        interval = statistics.interval(samples[key])
        metrics[key] = {"value": result, "ci95": interval, "n": defined, "convention": conventions[key]}
        metrics[key] |= shuffled.get(key, {})
    if direction != MOL2CAP:
        metrics |= _frechet_distances(references, predictions, per_example["validity"] > 0, fcd, cache_dir, num_workers)
    metrics |= {key: {"absent": reason} for key, reason in absent.items()}
    return {"counts": counts, "metrics": metrics}, per_example


def statistics_of(direction: str, per_example: dict) -> dict[str, tuple]:
    """The statistics (columns and a function of their sums, see statistics.py) that per-example columns define."""
    columns = {key: np.asarray(values, float) for key, values in per_example.items()}
    found = {}
    for name in ("bleu", "bleu_undoubled"):
        if f"stat_{name}_match_1" in columns:
            shared = np.stack([columns[f"stat_{name}_{column}"] for column in caption.BLEU_COLUMNS], 1)
            for key, order in (("bleu2", 2), ("bleu4", 4)) if direction == MOL2CAP else ((name, 4),):
                found[key] = shared, lambda sums, order=order: caption.bleu_of_sums(sums, order)
    if "stat_bleu_shuffled_match_1" in columns:
        orders = [columns[f"stat_bleu_shuffled_match_{k}"] for k in (1, 2)]
        own = np.stack([*(columns[f"stat_bleu_{column}"] for column in caption.BLEU_COLUMNS), *orders], 1)
        found["bleu2_grounding"] = own, grounding.bleu2_of_sums
    found |= {key: statistics.mean(columns[key]) for key in _MEANS[direction] if key in columns}
    found |= {f"{k}_invalid0": statistics.mean(np.nan_to_num(columns[k])) for k in _FINGERPRINTS if k in columns}
    if "stat_combination_tp" in columns:
        from lmolt.metrics import properties

        shared = np.stack([columns[c] for c in properties.COMBINATION_COLUMNS], 1)
        for key in _COMBINATION:
            found[f"combination_{key}"] = shared, lambda sums, key=key: properties.ratio_of_sums(key, sums)
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
    paired = {("a", k): own[k] for k in keys} | {("b", k): other[k] for k in keys}
    samples = statistics.bootstrap(paired, n_bootstrap, seed)
    results = {}
    for key in keys:
        values = [float(value(columns.sum(0))) for columns, value in (own[key], other[key])]
        differences = samples["a", key] - samples["b", key]
        if np.isnan(values).any() or not np.isfinite(differences).any():
            continue
        results[key] = {
            "difference": values[0] - values[1],
            "ci95": statistics.interval(differences),
            "p": statistics.p_value(differences),
            "n": rows.copy().pop(),
        }
    return results


def _tokenizer_name(tokenizer) -> str:
    if tokenizer is None:
        return "plain words and punctuation marks: NOT comparable with published numbers, which need SciBERT's"
    return getattr(tokenizer, "__name__", "a callable") if callable(tokenizer) else f"word pieces of {tokenizer}"


def _captions(molecules, references, predictions, tokenizer, nli_model, nltk_data, n_shuffles, seed, num_workers):
    from lmolt.metrics import hallucination
    from lmolt.metrics.meteor import WordNet, meteor

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
        absent |= dict.fromkeys(("bleu2_grounding", "rougeL_grounding"), _NO_SHUFFLES)
    try:
        per_example["meteor"] = meteor(*corpora, names, WordNet(nltk_data))
    except FileNotFoundError as error:
        absent["meteor"] = str(error)
    if nli_model is None:
        reason = "no NLI model given; name one with --nli_model, a folder or a Hub id"
        absent |= {"nli_entailment": reason, "nli_win_rate": reason}
    else:
        try:
            scores = hallucination.entailment(references, predictions, nli_model)
            per_example |= dict(zip(("nli_entailment", "nli_win_rate"), scores, strict=True))
        except OSError as error:
            reason = f"NLI model {nli_model} could not be loaded: {str(error).strip().splitlines()[0]}"
            absent |= {"nli_entailment": reason, "nli_win_rate": reason}
    per_example |= hallucination.group_scores(molecules, references, predictions, num_workers)
    unit = _tokenizer_name(tokenizer)
    cut_at = f"{unit}, first {caption.MAX_PIECES}"
    rouge = "rouge-score F1, lower-cased words, no stemming"
    nli = f"premise = reference, hypothesis = prediction, {nli_model}; {hallucination.EMPTY_IS_NOT_ENTAILED}"
    groups = f"{len(hallucination.GROUPS)} functional groups by ChEBI's class words (docs/metrics.md)"
    conventions = {
        "bleu2": f"NLTK corpus BLEU, weights 1/2 each, no smoothing; {cut_at}",
        "bleu4": f"NLTK corpus BLEU, weights 1/4 each, no smoothing; {cut_at}",
        **dict.fromkeys(("rouge1", "rouge2", "rougeL"), rouge),
        "meteor": f"NLTK METEOR (alpha 0.9, beta 3, gamma 0.5), WordNet 3.0; {cut_at}",
        "delta_len": f"prediction minus reference; {unit}",
        "nli_entailment": f"mean probability; {nli}",
        "nli_win_rate": f"share with entailment the arg-max; {nli}",
        "bleu2_grounding": f"bleu2 less that of {_shuffled(n_shuffles, seed)}, pooled",
        "rougeL_grounding": f"rougeL less that of {_shuffled(n_shuffles, seed)}",
        "group_hallucination": f"share of claimed groups the molecule lacks, over captions that claim any; {groups}",
        "group_hallucination_reference": f"the same of the reference captions: the floor; {groups}",
        "group_unclaimed": f"share of the molecule's groups not claimed; {groups}",
        "group_missed": f"share of the groups the reference rightly claims that the prediction does not; {groups}",
    }
    return absent, conventions, per_example, shuffled


def _shuffled(n_shuffles: int, seed: int) -> str:
    return f"{n_shuffles} shuffles of the predictions (seed {seed}): 0 for outputs that do not depend on the source"


def _molecules(
    references, predictions, counts, chrf_threshold, delta_threshold, cache_dir, n_shuffles, seed, num_workers
):
    from lmolt.metrics import molecule
    from lmolt.metrics.hallucination import chrf, win

    pairs = molecule.compare(references, predictions, cache_dir, num_workers)
    compared = molecule.columns(pairs)
    valid = compared["validity"] > 0
    counts["invalid_prediction"] = int((~valid).sum())
    counts["overlong_prediction"] = sum(len(p) > molecule.MAX_CHARACTERS for p in predictions)
    doubled = {"reference": references, "prediction": predictions}
    counts |= {f"doubled_backslash_{side}": sum("\\\\" in s for s in texts) for side, texts in doubled.items()}
    delta = np.array([len(p) - len(r) for r, p in zip(references, predictions, strict=True)], float)
    per_example = {
        **_bleu_of_characters("bleu", references, predictions),
        **compared,
        "levenshtein": molecule.levenshtein(references, predictions),
        "chrf": chrf(references, predictions),
        "delta_len": delta,
        "uniqueness": molecule.uniqueness(predictions, valid),
        "scaffold_match": molecule.scaffold_match(references, predictions, valid, num_workers),
    }
    per_example["win_rate"] = win(per_example["chrf"], delta, valid, chrf_threshold, delta_threshold)
    absent, shuffled = {}, {}
    if valid.sum() > 1 and n_shuffles > 0:
        environments = molecule.environments([pair for pair in pairs if pair])
        shuffles = grounding.permutations(int(valid.sum()), n_shuffles, seed)
        extra, shuffled = grounding.of_molecules(environments, per_example["morgan"][valid], shuffles)
        per_example["morgan_grounding"] = np.full(len(valid), np.nan)
        per_example["morgan_grounding"][valid] = extra
    else:
        absent["morgan_grounding"] = _NO_SHUFFLES
    if counts["doubled_backslash_reference"] + counts["doubled_backslash_prediction"]:
        undoubled = [[s.replace("\\\\", "\\") for s in texts] for texts in (references, predictions)]
        per_example |= _bleu_of_characters("bleu_undoubled", *undoubled)
        per_example["levenshtein_undoubled"] = molecule.levenshtein(*undoubled)
        per_example["chrf_undoubled"] = chrf(*undoubled)
    version = importlib.metadata.version("rdkit")
    as_is = "characters as they are in the file"
    once = "characters, ChEBI-20's doubled backslashes made single on both sides"
    tanimoto = f"RDKit {version}, mean Tanimoto; equal molecules 1"
    over = {"": "over valid predictions (MolT5)", "_invalid0": "an invalid prediction 0 (L+M-24)"}
    kinds = {
        "maccs": "MACCS keys",
        "rdk": "RDKit path fingerprint",
        "morgan": "Morgan radius 2, sparse counts",
    }
    conventions = {
        "bleu": f"NLTK corpus BLEU, weights 1/4 each, no smoothing; {as_is}",
        "bleu_undoubled": f"as bleu; {once}",
        "exact_match": f"equal InChI, RDKit {version}; molecules with `*` have none and never match",
        "levenshtein": f"mean edit distance; {as_is}",
        "levenshtein_undoubled": f"mean edit distance; {once}",
        "validity": f"RDKit {version} parses it; empty or over {molecule.MAX_CHARACTERS} characters is invalid",
        "chrf": f"mean of character F1 for n = 1, 2, 3; {as_is}",
        "chrf_undoubled": f"as chrf; {once}",
        "delta_len": f"prediction minus reference; {as_is}",
        "win_rate": f"Chr-F > {chrf_threshold}, |delta length| < {delta_threshold} and valid",
        "uniqueness": "distinct valid strings / valid strings; interval with each string's count held",
        "canonical_match": f"equal canonical SMILES, RDKit {version}",
        "canonical_match_no_stereo": f"equal canonical SMILES without stereochemistry, RDKit {version}",
        "scaffold_match": "equal Bemis-Murcko scaffold without stereochemistry, over references with a ring; invalid 0",
        "morgan_grounding": f"morgan less that of {_shuffled(n_shuffles, seed)}; among valid predictions' rows",
    }
    for key, kind in kinds.items():
        conventions |= {key + suffix: f"{kind}, {tanimoto}; {rule}" for suffix, rule in over.items()}
    return absent, conventions, per_example, shuffled


def _bleu_of_characters(name: str, references: list[str], predictions: list[str]) -> dict[str, np.ndarray]:
    columns = caption.bleu_columns(characters(references), characters(predictions))
    return {f"stat_{name}_{key}": values for key, values in columns.items()}


def _frechet_distances(references, predictions, valid, wanted: bool, cache_dir, num_workers) -> dict[str, dict]:
    keys = {"fcd": "1.2.2", "fcd_1_1": "1.1"}
    if not wanted:
        return {key: {"absent": "not asked for"} for key in keys}
    from lmolt.metrics import fcd, molecule

    ours = [p for p, ok in zip(predictions, valid, strict=True) if ok]
    canonical = molecule.in_processes(molecule.canonical, [*references, *ours], num_workers)
    sides = canonical[: len(references)], canonical[len(references) :]
    rules = {
        "1.2.2": "fcd 1.2.2: whole SMILES, each list padded to max(350, its longest + 1)",
        "1.1": "fcd 1.1 (L+M-24): first fragment, 349 symbols, padded to 350",
    }
    results = {}
    for key, convention in keys.items():
        value = fcd.distance(*sides, convention, cache_dir)
        if np.isnan(value):
            results[key] = {
                "absent": f"needs two valid molecules on each side, found {len(references)} and {len(ours)}"
            }
            continue
        results[key] = {
            "value": value,
            "ci95": None,
            "ci95_absent": "a resample repeats molecules, which biases a covariance and with it the distance",
            "n": len(ours),
            "convention": f"{rules[convention]}; valid predictions, canonical SMILES",
        }
    return results
