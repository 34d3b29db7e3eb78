"""What candidates and ranks bring: greedy, beams, each rank and the oracle on unseen pairs, both directions.

    python benchmarks/ranking.py
    python benchmarks/ranking.py --limit 150 --num_candidates 16 --json ranking.json

Systems: the embedded default's CPO and SLERP + CPO (./launch.sh first). Similarity is Morgan's Tanimoto, an invalid
output 0, for molecules, and ROUGE-L for captions. Intervals are bootstrap percentiles over pairs, differences from
greedy paired, p-values Holm's over a table. The channel's weight is chosen on validation pairs, of 0.25, 0.5, 1 and 2.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

DEMO = Path("runs/demo")
SYSTEMS = {"CPO": (DEMO / "models/cap2mol", DEMO / "cpo"), "SLERP + CPO": (DEMO / "slerp", DEMO / "slerp_cpo")}
WEIGHTS = (0.25, 0.5, 1.0, 2.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=150, help="test pairs")
    parser.add_argument("--validation", type=int, default=80, help="validation pairs, for the channel's weight")
    parser.add_argument("--num_candidates", type=int, default=16)
    parser.add_argument("--num_beams", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def similarity(direction: str, references: list[str], outputs: list[str]):
    """(n,), 0 for no molecule and for an empty caption."""
    import numpy as np

    if direction == "cap2mol":
        from lmolt.metrics.molecule import columns, compare

        return np.nan_to_num(columns(outputs, compare(references, outputs))["morgan"])
    from lmolt.metrics.caption import rouge

    return rouge(references, outputs)["rougeL"]


def ways(translator, direction: str, pairs: list[dict], args, weights) -> tuple[dict, dict]:
    """Each way's outputs, and the seconds that greedy, beams, candidates and the reverse pass took."""
    import numpy as np

    from lmolt.generation.candidates import order
    from lmolt.prompts import COLUMNS

    source, target = COLUMNS[direction]
    sources, references = [p[source] for p in pairs], [p[target] for p in pairs]
    seconds, how = {}, {"max_new_tokens": args.max_new_tokens, "seed": args.seed}

    def timed(name, **more):
        start = time.perf_counter()
        found = translator(sources, direction, **how, **more)
        seconds[name] = time.perf_counter() - start
        return found

    made = {"greedy": timed("greedy").best(), "beams": timed("beams", num_beams=args.num_beams).best()}
    found = timed("candidates", num_candidates=args.num_candidates, rank="channel")
    of = [[c for c in found if c.row == row and c.rank] for row in range(1, len(sources) + 1)]
    best = lambda rank, weight: [(order(list(cs), rank, weight)[0].output if cs else "") for cs in of]
    made |= {rank: best(rank, 1.0) for rank in ("logp", "mean_logp", "votes")}
    made |= {f"channel {weight:g}": best("channel", weight) for weight in weights}
    every = [(row, c.output) for row, cs in enumerate(of) for c in cs]
    scores = similarity(direction, [references[row] for row, _ in every], [text for _, text in every])
    top = np.zeros(len(sources))
    for (row, _), value in zip(every, scores, strict=True):
        top[row] = max(top[row], value)
    values = {name: similarity(direction, references, outputs) for name, outputs in made.items()}
    return values | {"oracle": top}, seconds


def main() -> None:
    args = parse_arguments()
    if lacking := [str(part) for parts in SYSTEMS.values() for part in parts if not part.exists()]:
        print(f"not run: {', '.join(lacking)} are not there; ./launch.sh makes them")
        return
    import numpy as np
    from transformers.utils import logging

    from lmolt import Translator
    from lmolt.data.pairs import read_pairs
    from lmolt.metrics.statistics import bootstrap, holm, interval, mean, p_value

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parts = {}
    for split, n in (("validation", args.validation), ("test", args.limit)):
        pairs = read_pairs("demo", split)
        parts[split] = random.Random(args.seed).sample(pairs, min(n, len(pairs)))
    figures = {}
    for name, (model, adapter) in SYSTEMS.items():
        translator = Translator(model, adapter)
        for direction in ("cap2mol", "mol2cap"):
            values, _ = ways(translator, direction, parts["validation"], args, WEIGHTS)
            weight = max(WEIGHTS, key=lambda w, values=values: values[f"channel {w:g}"].mean())
            values, seconds = ways(translator, direction, parts["test"], args, [weight])
            samples = bootstrap({key: mean(column) for key, column in values.items()}, 10_000, args.seed)
            ps = holm([p_value(samples[key] - samples["greedy"]) for key in values if key != "greedy"])
            ps = dict(zip([key for key in values if key != "greedy"], ps, strict=True))
            print(f"\n{name}, {direction}, {len(parts['test'])} pairs; channel's weight {weight:g} by validation")
            print("| | similarity | 95 % | less greedy | 95 % | p |\n| :-- | --: | :-- | --: | :-- | --: |")
            for key, column in values.items():
                low, high = interval(samples[key])
                row = {"value": float(np.mean(column)), "ci95": [low, high]}
                line = f"| {key} | {row['value']:.3f} | {low:.3f} to {high:.3f} |"
                if key != "greedy":
                    a, b = interval(samples[key] - samples["greedy"])
                    row |= {"difference": float(np.mean(column - values["greedy"])), "difference_ci95": [a, b]}
                    row["p"] = float(ps[key])
                    line += f" {row['difference']:+.3f} | {a:+.3f} to {b:+.3f} | {row['p']:.4f} |"
                print(line, flush=True)
                figures[f"{name}, {direction}, {key}"] = row
            print("seconds: " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()), flush=True)
            figures[f"{name}, {direction}, seconds"] = seconds
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
