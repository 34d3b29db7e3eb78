"""Time LMolT's scoring beside the field's formulas run plainly with their libraries; assert equal numbers.

    python benchmarks/evaluate_vs_reference.py
    python benchmarks/evaluate_vs_reference.py --rounds 3 --json evaluate.json
    python benchmarks/evaluate_vs_reference.py --stages captions --captions molt5-large-smiles2caption.txt

The reference is what MolT5's and L+M-24's scripts do, written out here: NLTK's corpus BLEU and METEOR, rouge_score,
one RDKit call a fingerprint, fcd's get_fcd. References are ChEBI-20's validation set where ../shared/data has it, else
the NCI molecules that come with RDKit. The outputs have the shape of a good system's: a fifth verbatim (published exact
matches on ChEBI-20 are 8 to 50 %), 5 % the same molecule written otherwise, 4 % invalid, the rest a reference of like
length with one atom changed; captions mix their own sentences with those of one of like length, a tenth of words lost.
--captions and --molecules give other references and outputs.

Each side runs in fresh processes, in turn, on the same cores. `total` is the process's wall time, imports included; the
other figures are stages after the imports. With --rounds each side's fastest counts. FCD is fcd 1.2.2's number.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

SHARED = ROOT.parent / "shared" / "data"
STAGES = ("captions", "molecules", "fcd", "total")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3300)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side")
    parser.add_argument("--stages", nargs="+", choices=STAGES[:3], default=STAGES[:3])
    parser.add_argument("--data", type=Path, default=SHARED, help="chebi20/validation.txt, scibert, nltk_data")
    parser.add_argument("--captions", type=Path, help="a reference script's table of captions, such as MolT5's")
    parser.add_argument("--molecules", type=Path, help="and of molecules")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--side", choices=("reference", "ours"), help=argparse.SUPPRESS)  # the processes it starts
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    return parser.parse_args()


def reference_pairs(data: Path, rows: int) -> list[tuple[str, str]]:
    """`rows` (SMILES, caption) pairs that RDKit can read."""
    source = data / "chebi20" / "validation.txt"
    if source.is_file():
        lines = source.read_text(encoding="utf-8").splitlines()[1:]
        pairs = [(s.replace("\\\\", "\\"), text) for _, s, text in (line.split("\t") for line in lines)]
    else:
        from rdkit import RDConfig

        names = ("alcohol", "ketone", "member of benzenes", "secondary amine", "solvent", "carboxylic ester")
        lines = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()
        pairs = []
        for number, line in enumerate(lines):
            draw = random.Random(number)
            text = ". It has a role as a ".join(draw.sample(names, 4))
            pairs.append((line.split()[0], f"The molecule is a {text} number {number}."))
    from lmolt.metrics.smiles import canonical
    from lmolt.metrics.workers import in_processes

    readable = in_processes(canonical, [s for s, _ in pairs])
    return [pair for pair, found in zip(pairs, readable, strict=True) if found][:rows]


def outputs(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """A stand-in system's (SMILES, captions) for the pairs, in the shape the module's docstring says."""
    from rdkit import Chem

    from lmolt.metrics.smiles import canonical
    from lmolt.metrics.workers import in_processes

    draw = random.Random(0)
    changed = {}
    for smiles, _ in pairs:
        atoms = [i for i, c in enumerate(smiles) if c in "CNO" and smiles[i + 1 : i + 2] not in ("l", "a", "o")]
        options = [smiles[:i] + draw.choice("CNOS") + smiles[i + 1 :] for i in draw.sample(atoms, min(4, len(atoms)))]
        changed[smiles] = [o for o in options if o != smiles]
    options = list({o for options in changed.values() for o in options})
    readable = dict(zip(options, in_processes(canonical, options), strict=True))
    # RDKit calls two empty fingerprints unlike (0), LMolT equal SMILES alike (1): salts of single atoms stay apart.
    plain = [Chem.MolFromSmiles(smiles).GetNumBonds() > 2 for smiles, _ in pairs]
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    neighbour = {i: by_length[max(0, at - 1)] for at, i in enumerate(by_length)}
    molecules, captions = [], []
    for i, (smiles, caption) in enumerate(pairs):
        kind = draw.random()
        other = pairs[neighbour[i]]
        if kind < 0.2 and plain[i]:
            molecules.append(smiles)
        elif kind < 0.25 and plain[i]:
            molecules.append(canonical(smiles))
        elif kind < 0.29:
            molecules.append(smiles[: len(smiles) // 2] + "(")
        else:
            molecules.append(next((o for o in changed[other[0]] if readable[o]), other[0]))
        words = caption.split() if kind < 0.2 else caption.split(". ")[0].split() + other[1].split()[4:]
        captions.append(" ".join(w for w in words if kind < 0.1 or draw.random() > 0.1))
    return molecules, captions


def reference_captions(references, predictions, data: Path) -> dict[str, float]:
    import numpy as np
    from nltk.translate.bleu_score import corpus_bleu
    from nltk.translate.meteor_score import meteor_score
    from rouge_score import rouge_scorer
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(data / "scibert")
    tokenize = lambda text: tokenizer.convert_ids_to_tokens(
        tokenizer(text, add_special_tokens=False, truncation=True, max_length=512)["input_ids"]
    )
    theirs, ours = [], []
    for reference, prediction in zip(references, predictions, strict=True):
        theirs.append(tokenize(reference))
        ours.append(tokenize(prediction))
    meteor = [meteor_score([a], b) for a, b in zip(theirs, ours, strict=True)]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouge = [scorer.score(b, a) for a, b in zip(references, predictions, strict=True)]
    return {
        "bleu2": corpus_bleu([[a] for a in theirs], ours, weights=(0.5, 0.5)),
        "bleu4": corpus_bleu([[a] for a in theirs], ours, weights=(0.25, 0.25, 0.25, 0.25)),
        "meteor": np.mean(meteor),
        **{key: np.mean([r[key].fmeasure for r in rouge]) for key in ("rouge1", "rouge2", "rougeL")},
    }


def reference_molecules(references, predictions) -> dict[str, float]:
    import numpy as np
    from nltk.translate.bleu_score import corpus_bleu
    from rapidfuzz.distance import Levenshtein
    from rdkit import Chem, DataStructs
    from rdkit.Chem import AllChem, MACCSkeys

    pairs = list(zip(references, predictions, strict=True))
    exact, invalid = 0, 0
    for reference, prediction in pairs:  # MolT5's mol_translation_metrics.py
        ours, theirs = Chem.MolFromSmiles(prediction), Chem.MolFromSmiles(reference)
        if ours is None:
            invalid += 1
        else:
            exact += Chem.MolToInchi(ours) == Chem.MolToInchi(theirs)
    similarities, valid = {"maccs": [], "rdk": [], "morgan": []}, []
    for reference, prediction in pairs:  # its fingerprint_metrics.py, which parses again
        theirs, ours = Chem.MolFromSmiles(reference), Chem.MolFromSmiles(prediction)
        if ours is not None:
            valid.append(prediction)
            for key, fingerprint in (
                ("maccs", MACCSkeys.GenMACCSKeys),
                ("rdk", Chem.RDKFingerprint),
                ("morgan", lambda m: AllChem.GetMorganFingerprint(m, 2)),
            ):
                similarities[key].append(DataStructs.TanimotoSimilarity(fingerprint(theirs), fingerprint(ours)))
    return {
        "bleu": corpus_bleu([[list(r)] for r, _ in pairs], [list(p) for _, p in pairs]),
        "exact_match": exact / len(pairs),
        "levenshtein": np.mean([Levenshtein.distance(r, p) for r, p in pairs]),
        "validity": 1 - invalid / len(pairs),
        "uniqueness": len(set(valid)) / len(valid),
        **{key: np.mean(values) for key, values in similarities.items()},
    }


def reference_fcd(references, predictions) -> dict[str, float]:
    from fcd import canonical_smiles, get_fcd, load_ref_model

    sides = [[s for s in canonical_smiles(side) if s is not None] for side in (references, predictions)]
    return {"fcd": get_fcd(*sides, load_ref_model())}


def our_captions(references, predictions, data: Path) -> dict[str, float]:
    import numpy as np

    from lmolt.metrics import caption
    from lmolt.metrics.meteor import WordNet, meteor
    from lmolt.metrics.ngrams import flatten

    pieces, names = caption.word_pieces([*references, *predictions], data / "scibert")
    corpora = flatten(pieces[: len(references)]), flatten(pieces[len(references) :])
    columns = caption.bleu_columns(*corpora)
    sums = np.array([columns[name].sum() for name in caption.BLEU_COLUMNS])
    return {
        "bleu2": caption.bleu_of_sums(sums, 2),
        "bleu4": caption.bleu_of_sums(sums, 4),
        "meteor": meteor(*corpora, names, WordNet(data / "nltk_data"))["meteor"].mean(),
        **{key: scores.mean() for key, scores in caption.rouge(references, predictions).items()},
    }


def our_molecules(references, predictions, cache) -> dict[str, float]:
    import numpy as np

    from lmolt.metrics import caption, molecule
    from lmolt.metrics.ngrams import characters

    compared = molecule.columns(predictions, molecule.compare(references, predictions, cache))
    columns = caption.bleu_columns(characters(references), characters(predictions))
    return {
        "bleu": caption.bleu_of_sums(np.array([columns[name].sum() for name in caption.BLEU_COLUMNS])),
        "levenshtein": molecule.levenshtein(references, predictions).mean(),
        "uniqueness": np.nanmean(molecule.uniqueness(predictions, compared["validity"] > 0)),
        **{key: np.nanmean(compared[key]) for key in ("exact_match", "validity", "maccs", "rdk", "morgan")},
    }


def our_fcd(references, predictions, cache) -> dict[str, float]:
    from lmolt.metrics import fcd
    from lmolt.metrics.smiles import canonical
    from lmolt.metrics.workers import in_processes

    both = in_processes(canonical, [*references, *predictions])
    sides = both[: len(references)], [s for s in both[len(references) :] if s]
    return {"fcd": fcd.distance(*sides, "1.2.2", cache)}


def run_side(arguments: argparse.Namespace) -> None:
    """One process: read the data from stdin, import, run the stages; seconds and numbers as JSON on stdout."""
    data = json.load(sys.stdin)
    if arguments.side == "reference":
        import nltk
        import rouge_score.rouge_scorer
        import transformers
        from rdkit import RDLogger

        assert transformers.BertTokenizerFast and rouge_score  # lazily imported otherwise
        nltk.data.path.insert(0, str(arguments.data / "nltk_data"))
        RDLogger.DisableLog("rdApp.*")
        if "fcd" in arguments.stages:
            import fcd  # noqa: F401
    else:
        import nltk.stem.porter
        import rapidfuzz.process
        import tokenizers

        import lmolt.metrics.molecule

        assert tokenizers and rapidfuzz
        if "fcd" in arguments.stages:
            import fcd  # noqa: F401

            import lmolt.metrics.fcd  # noqa: F401
    seconds, numbers = {}, {}
    cache = [] if arguments.side == "reference" else [arguments.cache]
    for stage in arguments.stages:
        function = globals()[f"{'our' if arguments.side == 'ours' else 'reference'}_{stage}"]
        start = time.perf_counter()
        texts = data["captions" if stage == "captions" else "molecules"]
        numbers |= function(*texts, *([arguments.data] if stage == "captions" else cache))
        seconds[stage] = time.perf_counter() - start
    json.dump({"seconds": seconds, "numbers": {k: float(v) for k, v in numbers.items()}}, sys.stdout)


def measure(side: str, data: dict, arguments: argparse.Namespace, cache: str | None = None) -> dict:
    command = [sys.executable, __file__, "--side", side, "--data", str(arguments.data), "--stages", *arguments.stages]
    command += ["--cache", cache] if cache else []
    start = time.perf_counter()
    done = subprocess.run(command, input=json.dumps(data), capture_output=True, text=True)
    total = time.perf_counter() - start
    if done.returncode:
        raise ValueError(f"the {side} side failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout)
    return {"seconds": result["seconds"] | {"total": total}, "numbers": result["numbers"]}


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        run_side(arguments)
        return
    if "captions" in arguments.stages and not (arguments.data / "scibert").is_dir():
        raise FileNotFoundError(
            f"{arguments.data}: needs scibert/ and nltk_data/; see --data, or --stages molecules fcd"
        )
    data = {}
    if not (arguments.captions and arguments.molecules):
        pairs = reference_pairs(arguments.data, arguments.rows)
        molecules, captions = outputs(pairs)
        data = {"molecules": [[s for s, _ in pairs], molecules], "captions": [[c for _, c in pairs], captions]}
    for kind, direction in (("captions", "mol2cap"), ("molecules", "cap2mol")):
        if file := getattr(arguments, kind):
            from lmolt.data.predictions import read_predictions

            rows = read_predictions(file, direction)[0][: arguments.rows]
            data[kind] = [[row[key] for row in rows] for key in ("reference", "prediction")]
    best, expected = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        measure("ours", data, arguments, cache)  # fills the cache
        for number in range(arguments.rounds):
            for name, side, place in (
                ("reference", "reference", None),
                ("ours", "ours", None),
                ("cached", "ours", cache),
            ):
                result = measure(side, data, arguments, place)
                seconds = result["seconds"]
                print(
                    f"round {number + 1} {name}: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()), flush=True
                )
                best.setdefault(name, seconds)
                best[name] = {k: min(v, best[name][k]) for k, v in seconds.items()}
                expected = expected or result["numbers"]
                for key, value in result["numbers"].items():
                    tolerance = 1e-3 if key == "fcd" else 1e-6
                    if not abs(value - expected[key]) <= tolerance:
                        raise ValueError(f"{name} {key} is {value}, the reference {expected[key]}")
    first = "captions" if "captions" in arguments.stages else "molecules"
    figures = {"rows": len(data[first][0]), "cores": len(os.sched_getaffinity(0))}
    for stage in (*arguments.stages, "total"):
        figures[f"{stage}_reference_s"] = best["reference"][stage]
        for name, suffix in (("ours", ""), ("cached", "_cached")):
            if stage == "captions" and suffix:
                continue  # captions keep nothing between runs
            figures[f"{stage}{suffix}_s"] = best[name][stage]
            figures[f"{stage}{suffix}_speedup"] = best["reference"][stage] / best[name][stage]
    print("\nequal numbers: " + ", ".join(f"{key} {value:.6f}" for key, value in expected.items()))
    for key in (key for key in figures if key.endswith("_speedup")):
        print(f"{key:<26}{figures[key]:6.2f}x")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
