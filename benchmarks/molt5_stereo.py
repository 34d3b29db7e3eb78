"""MolT5's wrong molecules that are right but for stereo, of which its vocabulary can't write half (docs/paper.md).

    git clone https://github.com/blender-nlp/MolT5
    python benchmarks/molt5_stereo.py --predictions MolT5/predictions --molecules lpm24/train_props.txt.gz

Of each file of --predictions (columns `ground truth` and `output`): wrong outputs, those of them that RDKit parses,
those that are gold without its backslashes, and those that differ from gold in any stereo only; by canonical SMILES. Of
--molecules (the first column of each line): how many have a backslash, and what every --nth of these is without it.
"""

import argparse
import csv
import gzip
import json
from pathlib import Path

from rdkit import Chem, rdBase

COUNTS = ("rows", "backslash in gold", "backslash in output", "wrong", "valid")
COUNTS += ("gold without backslashes", "stereo only")


def canonical(smiles: str, stereo: bool = True) -> str | None:
    molecule = Chem.MolFromSmiles(smiles)
    return None if molecule is None else Chem.MolToSmiles(molecule, isomericSmiles=stereo)


def of_predictions(file: Path) -> dict[str, int]:
    counts = dict.fromkeys(COUNTS, 0)
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE):
            gold, output = row["ground truth"].replace("\\\\", "\\"), row["output"] or ""
            counts["rows"] += 1
            counts["backslash in gold"] += "\\" in gold
            counts["backslash in output"] += "\\" in output
            found = canonical(output) if output else None
            if found is not None and found == canonical(gold):
                continue
            counts["wrong"] += 1
            if found is not None:
                counts["valid"] += 1
                counts["gold without backslashes"] += "\\" in gold and found == canonical(gold.replace("\\", ""))
                counts["stereo only"] += canonical(output, stereo=False) == canonical(gold, stereo=False)
    return counts


def of_molecules(file: Path, nth: int) -> dict[str, int]:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as opened:
        molecules = [line.split("\t")[0].strip() for line in opened]
    written = [smiles for smiles in molecules if "\\" in smiles]
    looked_at = written[::nth]
    without = [(canonical(smiles), canonical(smiles.replace("\\", ""))) for smiles in looked_at]
    return {
        "molecules": len(molecules),
        "with a backslash": len(written),
        "looked at": len(looked_at),
        "invalid without": sum(bare is None for _, bare in without),
        "the same without": sum(bare == whole for whole, bare in without),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--molecules", type=Path)
    parser.add_argument("--nth", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {}
    with rdBase.BlockLogs():
        for file in sorted(args.predictions.glob("molt5-*-caption2smiles.txt")):
            found[file.stem] = of_predictions(file)
        if args.molecules:
            found[args.molecules.name] = of_molecules(args.molecules, args.nth)
    for name, counts in found.items():
        print(f"{name}: " + ", ".join(f"{key} {count:,}" for key, count in counts.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
