"""L+M-24's public submissions: LMolT's readers and scores beside the organisers' scorers.

    git clone https://github.com/language-plus-molecules/LPM-24-Dataset
    python benchmarks/lpm24_submissions.py --repository LPM-24-Dataset --data DATA
    OLD/bin/python benchmarks/lpm24_submissions.py --repository LPM-24-Dataset --plain plain.json
    python benchmarks/lpm24_submissions.py --repository LPM-24-Dataset --tasks molgen --beside plain.json

Of molgen's 16 submissions: the published validity, and validity and uniqueness by the organisers' formulas with the
RDKit that is installed and by LMolT, with what a difference consists of. Their score files leave uniqueness out.
--plain writes the formulas' verdicts and needs nothing but RDKit: in an environment with the one that the organisers
pinned (2023.9.5) it tells what is RDKit's doing, once --beside reads it. Of captioning's 20: whether each line is read
as theirs, and how far the six metrics are from their formulas'. The true captions are not here; those of --stand_in are
the references in their place, for the first --rows rows.
"""

import argparse
import json
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]
SHARED = ROOT.parent / "shared" / "data"
TASKS = ("molgen", "captioning")


def submissions(repository: Path, task: str) -> dict[str, bytes]:
    """Team: its submit.txt."""
    folder = repository / "final_evaluation" / task / "submissions"
    found = {}
    for path in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as file:
            found[path.stem] = file.read("submit.txt")
    found.pop("test", None)  # the organisers' own trial, of 199 lines
    if not found:
        raise FileNotFoundError(f"{folder}: no submissions there; --repository is a clone of LPM-24-Dataset")
    return found


def their_lines(content: bytes) -> list[str]:
    """A submission as their scorers read it: `readlines` of the zip's bytes, decoded, stripped."""
    return [line.decode().strip() for line in content.removesuffix(b"\n").split(b"\n")]


def their_molecules(outputs: list[str]) -> dict:
    """Which are valid, and uniqueness, as evaluate_fp of molgen/scorer.py has them."""
    import rdkit
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    valid = [Chem.MolFromSmiles(output) is not None for output in outputs]
    strings = [output for output, ok in zip(outputs, valid, strict=True) if ok]
    return {"rdkit": rdkit.__version__, "valid": valid, "uniqueness": len(set(strings)) / len(strings)}


def molgen(repository: Path, beside: dict) -> None:
    from lmolt.data.predictions import read_predictions
    from lmolt.metrics import score

    versions = {its["rdkit"] for its in beside.values()}
    print("validity: published, by their formula, by LMolT (rows). uniqueness: by their formula, by LMolT")
    for name, content in submissions(repository, "molgen").items():
        published = json.loads((repository / f"final_evaluation/molgen/scores/{name}.json").read_text())["validity"]
        outputs = their_lines(content)
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / "submit.txt").write_bytes(content)
            rows, _ = read_predictions(file, "cap2mol", references=False)
        ours = [row["prediction"] for row in rows]
        if ours != outputs:
            raise ValueError(f"{name}: {sum(a != b for a, b in zip(ours, outputs, strict=False))} lines read otherwise")
        n, plain = len(outputs), their_molecules(outputs)
        part, columns = score("cap2mol", [""] * n, None, ours, n_bootstrap=2, n_shuffles=0)
        mine = [value > 0 for value in columns["validity"].tolist()]
        why = Counter(
            "empty" if not output else "too long or unfinished" if theirs else "valid here only"
            for output, theirs, its in zip(outputs, plain["valid"], mine, strict=True)
            if theirs != its
        )
        counts = round(published * n), sum(plain["valid"]), sum(mine)
        unique = plain["uniqueness"], part["metrics"]["uniqueness"]["value"]
        line = f"{name:26}{counts[0]:7}{counts[1] - counts[0]:+5}{counts[2] - counts[0]:+5}"
        line += f"   {unique[0]:.6f} {unique[1]:.6f} {unique[1] - unique[0]:+.6f}   "
        line += ", ".join(f"{cause}: {number}" for cause, number in why.items())
        strict = round(part["metrics"]["validity_strict"]["value"] * n)
        line += f"; strict {strict - counts[2]:+}" if strict != counts[2] else ""
        if old := beside.get(name):
            moved = [i for i, pair in enumerate(zip(old["valid"], plain["valid"], strict=True)) if len(set(pair)) > 1]
            line += f"; rdkit {old['rdkit']}: {sum(old['valid']) - counts[0]:+} valid, {len(moved)} verdicts moved"
            line += f", uniqueness {old['uniqueness']:.6f}"
            line += f", such as {outputs[moved[0]][:60]!r}" if moved else ""
        print(line, flush=True)
    if versions:
        print(f"beside rdkit {', '.join(versions)}")


def captioning(repository: Path, data: Path, stand_in: str, rows: int) -> None:
    import nltk
    from evaluate_vs_reference import our_captions, reference_captions

    from lmolt.data.predictions import read_predictions

    nltk.data.path.insert(0, str(data / "nltk_data"))
    files = submissions(repository, "captioning")
    # proc_line of captioning/scorer.py, on what readlines and strip gave.
    theirs = {
        name: [line[6:].strip() if line.startswith("[CLS] ") else line for line in their_lines(content)]
        for name, content in files.items()
    }
    for name, content in files.items():
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / "submit.txt").write_bytes(content)
            found, counts = read_predictions(file, "mol2cap", references=False)
        ours = [row["prediction"] for row in found]
        if ours != theirs[name]:
            raise ValueError(f"{name}: {sum(a != b for a, b in zip(ours, theirs[name], strict=False))} lines differ")
        line = f"{name:26}{len(ours)} lines equal; distinct {len(set(ours)) / len(ours):.4f}; "
        line += ", ".join(f"{cause} {number}" for cause, number in counts.items())
        if name != stand_in:
            pair = theirs[stand_in][:rows], ours[:rows]
            a, b = reference_captions(*pair, data), our_captions(*pair, data)
            key = max(a, key=lambda key: abs(a[key] - b[key]))
            line += f"; BLEU-2 {b['bleu2']:.4f}, largest of six differences {abs(a[key] - b[key]):.1e} ({key})"
        print(line, flush=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True, help="a clone of LPM-24-Dataset")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--plain", type=Path, help="write molgen's verdicts by their formulas here, and nothing else")
    parser.add_argument("--beside", type=Path, help="a file of --plain, made with another RDKit")
    parser.add_argument("--data", type=Path, default=SHARED, help="has scibert/ and nltk_data/")
    parser.add_argument("--stand_in", default="qizhipei", help="whose captions are the references")
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args(argv)
    if args.plain:
        found = {name: their_molecules(their_lines(c)) for name, c in submissions(args.repository, "molgen").items()}
        args.plain.write_text(json.dumps(found))
        return
    if "molgen" in args.tasks:
        molgen(args.repository, json.loads(args.beside.read_text()) if args.beside else {})
    if "captioning" in args.tasks:
        captioning(args.repository, args.data, args.stand_in, args.rows)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
