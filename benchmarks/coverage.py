"""Coverage of the 95 % intervals: how often they hold the value of the population that rows are drawn from.

    python benchmarks/coverage.py --predictions molt5-small-caption2smiles.txt --json coverage.json

The population is a file of a system's outputs (default: --rows of benchmarks/evaluate_vs_reference.py's stand-in
system). Of it, --trials times, n rows are drawn with replacement, and each metric's interval is made of 1,000 resamples
of them as scripts/evaluate.py makes it, and the percentile interval beside it. With 2,000 trials the standard error of
a coverage near 0.95 is 0.005.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

METRICS = {
    "cap2mol": (
        "bleu",
        "exact_match",
        "levenshtein",
        "validity",
        "maccs",
        "rdk",
        "morgan",
        "chrf",
        "delta_len",
        "win_rate",
    ),
    "mol2cap": ("bleu2", "bleu4", "rouge1", "rougeL", "meteor_stem", "delta_len", "group_hallucination"),
}


def main(argv: list[str]) -> None:
    from lmolt.data.predictions import read_predictions
    from lmolt.metrics import score, statistics
    from lmolt.metrics.scoring import statistics_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, help="a reference script's table, or one of LMolT's")
    parser.add_argument("--direction", choices=tuple(METRICS), default="cap2mol")
    parser.add_argument("--rows", type=int, nargs="+", default=[200], help="n of each sample")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    if args.predictions:
        rows, _ = read_predictions(args.predictions, args.direction)
        texts = [[row[key] for row in rows] for key in ("source", "reference", "prediction")]
    else:
        from evaluate_vs_reference import SHARED, outputs, reference_pairs

        pairs = reference_pairs(SHARED, 3300)
        molecules, captions = outputs(pairs)
        smiles, gold = map(list, zip(*pairs, strict=True))
        texts = [gold, smiles, molecules] if args.direction == "cap2mol" else [smiles, gold, captions]
    _, columns = score(args.direction, *texts, fcd=False, n_shuffles=0, n_bootstrap=2)
    whole = statistics_of(args.direction, columns)
    kept = {key: whole[key] for key in METRICS[args.direction] if key in whole}
    truth = {key: float(value(rows.sum(0))) for key, (rows, value) in kept.items()}
    figures = {}
    for n in args.rows:
        held = {key: np.zeros(2) for key in kept}
        rng = np.random.default_rng(0)
        for trial in range(args.trials):
            picks = rng.integers(0, len(texts[0]), n)
            shared = {id(rows): rows[picks] for rows, _ in kept.values()}
            mine = {key: (shared[id(rows)], value) for key, (rows, value) in kept.items()}
            for key, resampled in statistics.resample(mine, 1000, trial).items():
                both = statistics.confidence_interval(resampled), statistics.interval(resampled.values)
                for at, found in enumerate(both):
                    held[key][at] += found is not None and found[0] <= truth[key] <= found[1]
        print(f"{len(texts[0])} rows, samples of {n}, {args.trials} trials: coverage, and that of percentiles")
        for key, hits in held.items():
            figures[f"{key}_{n}"] = (hits / args.trials).tolist()
            print(f"  {key:22}{hits[0] / args.trials:8.3f}{hits[1] / args.trials:8.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    from lmolt.files import run_main

    run_main(main)
