"""The choice of the dis-preferred output, and what is counted on the way."""

from collections import Counter

import pytest
from nltk.translate.chrf_score import sentence_chrf
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator

from lmolt.data.negatives import describe, table, triples_of
from lmolt.report.figures import triples_figure

PAIR = {"id": "7", "molecule": "CC(=O)Nc1ccc(O)cc1", "caption": "The molecule is a pain killer."}


def test_the_closest_wrong_molecule_is_taken():
    near, far = "CCC(=O)Nc1ccc(O)cc1", "CCO"
    right = "Oc1ccc(NC(C)=O)cc1"
    counts = Counter()
    candidates = [[far, right, "", near + " ", "C1CC", near], [right], [], ["C1CC", "c1cc"], [far, "C1CC"]]
    triples, similarities = triples_of("cap2mol", [PAIR] * 5, candidates, False, counts)
    assert [triple["rejected"] for triple in triples] == [near, "C1CC", far]
    assert triples[0] == {
        "id": "7",
        "direction": "cap2mol",
        "source": PAIR["caption"],
        "chosen": PAIR["molecule"],
        "rejected": near,
    }
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2)
    prints = [generator.GetSparseCountFingerprint(Chem.MolFromSmiles(s)) for s in (PAIR["molecule"], near, far)]
    assert similarities[0] == DataStructs.TanimotoSimilarity(prints[0], prints[1])
    assert similarities[1] != similarities[1]
    assert similarities[2] == DataStructs.TanimotoSimilarity(prints[0], prints[2]) < similarities[0]
    assert counts == {
        "cap2mol: empty output": 1,
        "cap2mol: repeated output": 1,
        "cap2mol: output equal to the preferred one": 2,
        "cap2mol: no output": 1,
        "cap2mol: pairs without a wrong output": 2,
        "cap2mol: invalid SMILES kept": 1,
        "cap2mol: triples": 3,
    }
    counts.clear()
    triples, _ = triples_of("cap2mol", [PAIR] * 5, candidates, True, counts)
    assert [triple["rejected"] for triple in triples] == [near, far]
    assert counts["cap2mol: invalid SMILES dropped"] == 4 and counts["cap2mol: pairs without a wrong output"] == 3


def test_a_molecule_is_right_by_inchi_too():
    tautomer = {"id": "1", "molecule": "Cc1cnc[nH]1", "caption": "An imidazole."}
    counts = Counter()
    triples, _ = triples_of("cap2mol", [tautomer, tautomer], [["Cc1c[nH]cn1"], ["Cn1ccnc1"]], False, counts)
    assert [triple["rejected"] for triple in triples] == ["Cn1ccnc1"]  # of the same formula, but wrong
    assert counts["cap2mol: output equal to the preferred one"] == 1


def test_the_closest_wrong_caption_is_taken():
    near, far = "The molecule is a pain reliever.", "It smells."
    counts = Counter()
    same = "the molecule  is a PAIN killer."
    triples, similarities = triples_of("mol2cap", [PAIR, PAIR], [[far, same, near], [same]], False, counts)
    assert [triple["rejected"] for triple in triples] == [near]
    expected = sentence_chrf(PAIR["caption"], near, min_len=1, max_len=3, beta=1.0)
    assert similarities == [pytest.approx(expected)]
    assert counts["mol2cap: output equal to the preferred one"] == 2


def test_the_summary_of_known_triples():
    triples = [{"direction": "cap2mol", "source": "x", "chosen": "C" * n, "rejected": "C" * 2 * n} for n in (1, 2, 3)]
    described = {
        "cap2mol": describe("cap2mol", triples, [0.25, 0.75, float("nan")]),
        "mol2cap": describe("mol2cap", [], []),
    }
    assert described["cap2mol"]["characters"]["rejected"] == {"mean": 4, "quartiles": [3, 4, 5], "max": 6}
    assert described["cap2mol"]["validity of rejected"] == pytest.approx(2 / 3)
    spread = {"mean": 0.5, "quartiles": [0.375, 0.5, 0.625], "max": 0.75}
    assert described["cap2mol"]["similarity of rejected"] == {"measure": "Morgan Tanimoto", **spread}
    line = " ".join(table(described).splitlines()[1].split())
    assert line == "cap2mol 3 2 [2, 2] chars 4 [3, 5] chars 66.7% 0.50 [0.38, 0.62] Morgan Tanimoto"
    assert triples_figure(triples, {"cap2mol": [0.25, 0.75, float("nan")], "mol2cap": []}).startswith(b"\x89PNG")


def rejected(direction, pair, outputs, **chosen):
    triples, similarities = triples_of(direction, [pair], [outputs], False, Counter(), **chosen)
    assert len(triples) == len(similarities)
    return [triple["rejected"] for triple in triples]


def test_invalid_ones_first_and_several_of_a_pair():
    near, far, broken = "CCC(=O)Nc1ccc(O)cc1", "CCO", "C1CC"
    outputs = [far, broken, near]
    assert rejected("cap2mol", PAIR, outputs, choice="invalid") == [broken]
    assert rejected("cap2mol", PAIR, outputs, choice="invalid", most=2) == [broken, near]
    assert rejected("cap2mol", PAIR, outputs, most=5) == [near, far, broken]


def test_hallucinated_groups_are_counted_against_the_molecule():
    acetaminophen = PAIR  # an amide and a phenol; neither nitrile nor carboxylic acid
    true, one, two = (
        "The molecule is a phenol and an amide.",
        "The molecule is a phenol and a nitrile.",
        "The molecule is a nitrile and a carboxylic acid.",
    )
    assert rejected("mol2cap", acetaminophen, [true, two, one], choice="hallucinated", most=3) == [two, one, true]
    nitrile, amide = "N#CCc1ccc(O)cc1", "CCC(=O)Nc1ccc(O)cc1"
    assert rejected("cap2mol", acetaminophen, [amide, nitrile, "C1C"], choice="hallucinated") == [nitrile]
