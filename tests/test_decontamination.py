"""Duplicates and leakage against molecules whose relations are known."""

from lmolt.data.decontamination import decontaminate


def pairs(*molecules: str) -> list[dict]:
    return [{"id": smiles, "molecule": smiles, "caption": "x"} for smiles in molecules]


def ids(found: list[dict]) -> list[str]:
    return [pair["id"] for pair in found]


def test_duplicates_are_told_by_inchikey():
    # ethanol in two orders; acetone and its enol differ; a tautomer of mobile hydrogens is the same
    mine = pairs("CCO", "OCC", "CC(C)=O", "CC(O)=C", "c1cnc[nH]1", "Cc1cnc[nH]1", "Cc1c[nH]cn1", "*CO", "OC*")
    kept, counts = decontaminate(mine)
    assert kept == mine and counts == {"duplicate molecule kept": 3}
    kept, counts = decontaminate(mine, drop_duplicates=True)
    assert ids(kept) == ["CCO", "CC(C)=O", "CC(O)=C", "c1cnc[nH]1", "Cc1cnc[nH]1", "*CO"]
    assert counts == {"duplicate molecule dropped": 3}


def test_leakage_and_that_of_stereoisomers_apart():
    mine = pairs("OCC", "N[C@@H](C)C(O)=O", "N[C@H](C)C(O)=O", "NC(C)C(O)=O", "CCC", "*[C@H](F)Cl", "*[C@@H](F)Cl")
    excluded = pairs("CCO", "C[C@H](N)C(=O)O", "*[C@@H](F)Cl", "C1CC")
    found = {"molecule of an excluded pair dropped": 3, "excluded pairs that don't parse": 1}
    kept, counts = decontaminate(mine, excluded)
    assert ids(kept) == ["N[C@H](C)C(O)=O", "NC(C)C(O)=O", "CCC", "*[C@H](F)Cl"]
    assert counts == found | {"stereoisomer of an excluded pair's molecule kept": 3}
    kept, counts = decontaminate(mine, excluded, drop_stereoisomers=True)
    assert ids(kept) == ["CCC"]
    assert counts == found | {"stereoisomer of an excluded pair's molecule dropped": 3}


def test_nothing_excluded_and_nothing_at_all():
    assert decontaminate(pairs("C", "CC")) == (pairs("C", "CC"), {})
    assert decontaminate([], pairs("C")) == ([], {})
