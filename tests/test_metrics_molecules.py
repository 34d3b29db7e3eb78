"""Molecule metrics against RDKit, NLTK and fcd called plainly, and against the official scripts' numbers."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT
from rdkit import Chem, DataStructs
from rdkit.Chem import AllChem, MACCSkeys

from lmolt.metrics import compare, fcd, molecule, score, workers
from lmolt.metrics.hallucination import chrf
from lmolt.metrics.smiles import oddity

SHARED = Path(__file__).parents[2] / "shared" / "data"
REFERENCES = ["CCO", "C[C@H](N)C(=O)O", "c1ccccc1C", "CC(C)C", "C/C=C\\C", "C1CCCCC1O"]
PREDICTIONS = ["OCC", "C[C@@H](N)C(=O)O", "c1ccccc1", "C(", "", "C1CCCCC1N"]


@pytest.mark.skipif(not (SHARED / "lpm24").is_dir(), reason="needs shared/data/lpm24 beside the checkout")
def test_official_scores_of_real_molecules(tmp_path):
    expected = json.loads((SHARED / "lpm24/example_scores.json").read_text())["cap2mol_example.tsv"]
    lines = (SHARED / "lpm24/cap2mol_example.tsv").read_text(encoding="utf-8").split("\n")[1:]
    columns = list(map(list, zip(*(line.split("\t") for line in lines if line), strict=True)))
    first, per_example = score("cap2mol", *columns, cache_dir=tmp_path, num_workers=2)
    found = first["metrics"]
    names = {"exact": "exact_match", "fcd_1_2_2": "fcd"}
    for key, value in expected.items():
        tolerance = 1e-3 if key == "fcd_1_2_2" else 1e-6
        assert found[names.get(key, key)]["value"] == pytest.approx(value, abs=tolerance), key
    assert first["counts"]["invalid_prediction"] == 26 and found["maccs"]["n"] == 174
    assert found["validity"]["ci95"][0] < 0.87 < found["validity"]["ci95"][1]
    assert found["fcd"]["ci95"] is None and "resample" in found["fcd"]["ci95_absent"]
    assert found["fcd_1_1"]["value"] != found["fcd"]["value"]
    for where in (tmp_path, None):  # kept references, and none kept
        again, scores = score("cap2mol", *columns, cache_dir=where, num_workers=1)
        assert again == first and all(np.array_equal(scores[k], per_example[k], equal_nan=True) for k in scores)
    assert len(list(tmp_path.iterdir())) == 3  # features, and ChemNet under two rules


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "no folder"])
def test_a_damaged_cache_is_computed_again_and_one_that_can_not_be_written_is_none(damage, tmp_path, caplog):
    where = "/dev/null/none" if damage == "no folder" else tmp_path
    wanted = score("cap2mol", [""] * 6, REFERENCES, PREDICTIONS, fcd=False, cache_dir=where)
    if damage == "no folder":
        assert "is not kept (Not a directory); LMOLT_CACHE names another folder" in caplog.text
        return
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = {"cut": whole[:middle], "bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}
    file.write_bytes(damaged.get(damage, b""))
    again = score("cap2mol", [""] * 6, REFERENCES, PREDICTIONS, fcd=False, cache_dir=where)
    assert f"{file} is damaged" in caplog.text and file.read_bytes() == whole
    assert again[0] == wanted[0]


def test_small_set_by_hand():
    result, per_example = score("cap2mol", [""] * 6, REFERENCES, PREDICTIONS, fcd=False)
    found = result["metrics"]
    assert result["counts"] | {"empty_prediction": 1, "invalid_prediction": 2} == result["counts"]
    assert per_example["exact_match"].tolist() == [1, 0, 0, 0, 0, 0]
    assert per_example["canonical_match_no_stereo"].tolist() == [1, 1, 0, 0, 0, 0]
    assert per_example["validity"].tolist() == [1, 1, 1, 0, 0, 1]
    assert per_example["levenshtein"].tolist() == [2, 1, 1, 4, 7, 1]
    assert per_example["delta_len"].tolist() == [0, 1, -1, -4, -7, 0]
    assert per_example["scaffold_match"][[2, 5]].tolist() == [1, 1] and found["scaffold_match"]["n"] == 2
    assert found["maccs_invalid0"]["value"] == pytest.approx(found["maccs"]["value"] * 4 / 6)
    assert found["fcd"]["absent"] == "not asked for"
    strict = score("cap2mol", [""] * 6, REFERENCES, PREDICTIONS, fcd=False, delta_threshold=1, chrf_threshold=0.9)[1]
    assert strict["win_rate"].sum() == 0 and per_example["win_rate"].tolist() == [1, 1, 1, 0, 0, 1]


def test_fingerprints_equal_rdkit():
    valid = np.array([True, True, True, False, False, True])
    found = molecule.columns(PREDICTIONS, molecule.compare(REFERENCES, PREDICTIONS))
    old_morgan = lambda m: AllChem.GetMorganFingerprint(m, 2)
    kinds = {"maccs": MACCSkeys.GenMACCSKeys, "rdk": Chem.RDKFingerprint, "morgan": old_morgan}
    for key, fingerprint in kinds.items():
        assert found[key][0] == 1  # one molecule, written in two ways
        for i in np.flatnonzero(valid):
            ours, theirs = (fingerprint(Chem.MolFromSmiles(s[i])) for s in (REFERENCES, PREDICTIONS))
            assert found[key][i] == pytest.approx(DataStructs.TanimotoSimilarity(ours, theirs), abs=1e-12)
        assert np.isnan(found[key][~valid]).all()


def test_chrf_equals_nltk():
    from nltk.translate.chrf_score import sentence_chrf

    pairs = [("CCO", "OCC"), ("C", "C"), ("CC", ""), ("C C O", "CCO"), ("c1ccccc1", "c1ccccc1Cl")]
    expected = [sentence_chrf(a, b, min_len=1, max_len=3, beta=1.0) for a, b in pairs]
    assert chrf(*map(list, zip(*pairs, strict=True))) == pytest.approx(expected, abs=1e-12)


def test_traps():
    # The same dummy atoms say nothing; RDKit's Tanimoto of empty fingerprints (methane's) is 0; doubled backslashes are
    # one bond.
    references, predictions = ["*CC", "C", r"C/C=C\\C"], ["*CC", "C", r"C/C=C\C"]
    result, per_example = score("cap2mol", [""] * 3, references, predictions, fcd=False)
    found = result["metrics"]
    assert per_example["exact_match"].tolist() == [0, 1, 1]
    assert per_example["rdk"].tolist() == [1, 0, 1] and per_example["rdk_corrected"].tolist() == [1, 1, 1]
    assert result["counts"]["doubled_backslash_reference"] == 1
    assert found["levenshtein"]["value"] == pytest.approx(1 / 3) and found["levenshtein_undoubled"]["value"] == 0
    assert found["bleu"]["value"] < found["bleu_undoubled"]["value"]


@pytest.mark.parametrize("predictions", [["CCO"], [""], ["C("], ["C" * 10_000_000], [float("nan")]])
def test_one_row(predictions):
    found = score("cap2mol", [""], ["CCO"], predictions, n_bootstrap=20)[0]["metrics"]
    valid = predictions == ["CCO"]
    assert found["validity"]["value"] == valid
    assert "needs two valid molecules" in found["fcd"]["absent"]
    assert found["maccs"].get("absent") == "no prediction is valid" or valid


def test_all_invalid_identical_and_bad_references():
    found = score("cap2mol", [""] * 6, REFERENCES, ["C("] * 6, n_bootstrap=20)[0]["metrics"]
    assert found["validity"]["value"] == 0 and found["morgan_invalid0"]["value"] == 0
    assert all("absent" in found[key] for key in ("maccs", "rdk", "morgan", "fcd", "uniqueness"))
    found = score("cap2mol", [""] * 6, REFERENCES, REFERENCES, n_bootstrap=20)[0]["metrics"]
    for key in ("exact_match", "maccs", "rdk", "morgan", "chrf", "win_rate", "scaffold_match"):
        assert found[key]["value"] == pytest.approx(1) and found[key]["ci95"] == pytest.approx([1, 1])
    assert found["fcd"]["value"] == pytest.approx(0, abs=1e-4)
    found = score("cap2mol", [""] * 6, REFERENCES, ["CCO"] * 6, n_bootstrap=20)[0]["metrics"]
    assert found["uniqueness"]["value"] == pytest.approx(1 / 6) and found["fcd"]["value"] > 0
    with pytest.raises(ValueError, match=r"row 2: the reference 'C\(' is not a molecule RDKit can read"):
        score("cap2mol", [""] * 2, ["C", "C("], ["C", "C"])


def test_activations_and_distance_equal_fcd(monkeypatch):
    from fcd import calculate_frechet_distance, get_predictions, load_ref_model

    chains = ["C" * n for n in (1, 2, 5, 40, 349, 400)] + ["ClCCBr", "[Si](C)C", "c1ccccc1.[Na+]", "CCO", "CCO"]
    monkeypatch.setattr(fcd, "_BATCH", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fcd's advice about padding
        expected = get_predictions(load_ref_model(), chains, n_jobs=0)
        short = get_predictions(load_ref_model(), [s.partition(".")[0][:349] for s in chains], n_jobs=0)
    found = fcd.activations(chains, "1.2.2")
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(fcd.activations(chains, "1.1") - short).max() < 1e-5
    rng = np.random.default_rng(0)
    sides = [rng.normal(size=(900, 512)) * rng.uniform(0.1, 1, 512) + m for m in (0, 0.1)]
    fits = [(x.mean(0), np.cov(x.T)) for x in sides]
    expected = calculate_frechet_distance(fits[0][0], fits[0][1], fits[1][0], fits[1][1])
    assert fcd.frechet(*fits) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(fcd.distance(["C"], ["C", "CC"], "1.1"))


def test_pool_equals_one_process():
    smiles = ["C" * n + tail for n in range(1, 70) for tail in ("O", "N", "(", "[Na+].[Cl-]")]
    one, two = (
        molecule.columns(smiles, molecule.compare(smiles[::4] * 4, smiles, None, workers)) for workers in (1, 2)
    )
    assert all(np.array_equal(one[key], two[key], equal_nan=True) for key in one)


def test_compare_needs_no_sources():
    good = score("cap2mol", [""] * 6, REFERENCES, REFERENCES, fcd=False)[1]
    poor = score("cap2mol", [""] * 6, REFERENCES, PREDICTIONS, fcd=False)[1]
    found = compare("cap2mol", good, poor)
    assert found["validity"]["difference"] == pytest.approx(2 / 6) and found["bleu"]["difference"] > 0
    assert {"maccs", "maccs_invalid0", "win_rate", "uniqueness"} <= found.keys()


def test_evaluate_load(monkeypatch, tmp_path):
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "modules")  # before the user's own, which may hold other versions
    root = Path(__file__).parents[1] / "metrics"
    molecules = evaluate.load(str(root / "molecules"), cache_dir=str(tmp_path))
    assert isinstance(molecules, evaluate.Metric) and "Chr-F" in molecules.description
    found = molecules.compute(predictions=PREDICTIONS, references=REFERENCES, fcd=False, n_bootstrap=20)
    assert found["exact_match"] == pytest.approx(1 / 6) and found["details"]["counts"]["empty_prediction"] == 1
    captions = evaluate.load(str(root / "captions"), cache_dir=str(tmp_path))
    found = captions.compute(predictions=["It is an acid."], references=["It is an amine."], n_bootstrap=20)
    assert found["rouge1"] == 0.75 and "absent" in found["details"]["metrics"]["nli_entailment"]
    found = captions.compute(predictions=["an ester"], references=["an ester"], sources=["CC"], n_bootstrap=20)
    assert found["group_hallucination"] == 1


def clique(n: int) -> str:
    """A SMILES of n uranium atoms, each bonded to each: a hundred characters that RDKit's path fingerprint dies of."""
    rings, number = [""] * n, 10
    for i in range(n):
        for j in range(i + 2, n):
            rings[i], rings[j], number = rings[i] + f"%{number}", rings[j] + f"%{number}", number + 1
    return "".join(f"[U]{ring}" for ring in rings)


def test_what_rdkit_does_not_finish_is_counted_and_the_rest_scored(monkeypatch):
    monkeypatch.setattr(workers, "SECONDS", 0.5)
    predictions = [clique(11), *PREDICTIONS[1:5], "C" * 6000]
    result, per_example = score("cap2mol", [""] * 6, REFERENCES, predictions, fcd=False, n_bootstrap=20)
    assert per_example["count_unfinished"].tolist() == [1, 0, 0, 0, 0, 0]
    assert per_example["validity"].tolist() == [0, 1, 1, 0, 0, 0]
    assert result["counts"]["unfinished_prediction"] == 1 and result["counts"]["overlong_prediction"] == 1
    with pytest.raises(ValueError, match=r"row 2: the reference '\[U\].*': RDKit .* --invalid_pairs drop"):
        score("cap2mol", [""] * 2, ["C", clique(11)], ["C", "C"], fcd=False)


def _end(item: str):
    if item.startswith("once "):  # what another process may do to a worker
        flag = Path(item.removeprefix("once "))
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "loop":
        while True:
            pass
    if item == "memory":
        return bytearray(3 * 2**30)
    if item == "rdkit":
        raise RuntimeError("Invariant Violation")
    if item == "ours":
        raise IndexError(item)
    if item == "data":
        raise ValueError(item)
    return item.upper()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_busy_worker_ends_with_its_parent():
    code = "import test_metrics_molecules as t; t.workers.in_processes(t._end, ['loop'])"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    process = psutil.Process(parent.pid)
    while not (busy := [child for child in process.children() if child.cpu_times().user > 1.5]):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(busy, timeout=3)[1] == []  # it would have 5 s of the processor


def test_workers_tell_why_an_item_has_no_result(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "SECONDS", 0.5)
    items = ["a", "crash", "b", "loop", "memory", "rdkit", "c"] + ["d"] * 100
    for count in (1, 2):
        found = workers.in_processes(_end, items, count)
        assert [str(f) for f in found if not isinstance(f, workers.Unfinished)] == ["A", "B", "C"] + ["D"] * 100
        assert [type(found[i]) for i in (1, 3, 4, 5)] == [workers.Unfinished] * 4
        assert found[1] == "RDKit crashed over it (SIGSEGV)" and found[3] == "RDKit did not finish it in 0.5 s"
        assert found[4] == "RDKit needed more than 2 GiB for it" and "Invariant Violation" in found[5]
    once = f"once {tmp_path / 'flag'}"
    assert workers.in_processes(_end, ["a", once, "b"], 1) == ["A", once.upper(), "B"]
    with pytest.raises(ValueError, match="data"):
        workers.in_processes(_end, ["a", "data"], 1)
    with pytest.raises(RuntimeError, match="by the error above"):  # never taken for a crash of RDKit's
        workers.in_processes(_end, ["a", "ours"], 1)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        *[("CCO and this is the answer", "text_after"), ("CCO ethanol", "text_after"), ("C\tC", "text_after")],
        *[("CCN |$;;R1$|", "cxsmiles"), ("C[C@H](O)F |o1:1|", "cxsmiles")],
        *[("CCO\u200b", "non_ascii"), ("\ufeffCCO", "non_ascii"), ("CCCl₂", "non_ascii"), ("ＣＣＯ", "non_ascii")],
        *[("CCO\u00a0", "non_ascii"), ("C\0C", "non_ascii")],
        *[("[C][C][O]", "selfies"), ("[C][=C][Branch1][C][O]", "selfies"), ("[O][=C]", "selfies")],
        *[
            ("InChI=1S/CH4/h1H4", "inchi"),
            ("nan", "missing_value"),
            ("N/A", "missing_value"),
            ("None", "missing_value"),
        ],
        *[("CCO<extra_id_0>", "special_token"), ("CCO<end_of_turn>", "special_token"), ("<0x0A>CCO", "special_token")],
        *[("CCO<｜end▁of▁sentence｜>", "special_token"), ("[INST]CCO", "special_token"), ("N->[Cu]<-N", None)],
        *[("<pad> CCO</s>", "special_token"), ("CCO[PAD]", "special_token"), ("CCO<|endoftext|>", "special_token")],
        *[("5", "number"), ("-1.5e3", "number"), ("['CCO', 'C']", "list"), ("CC>>CO", "reaction")],
        *[("C" * 5001, "overlong"), ("N", None), ("[O][O]", None), ("[2H][2H]", None), ("[Na+].[Cl-]", None)],
        *[("N->[Cu]", None), ("[NH3+][Pt-2]", None), (" CCO\n", None), ("*CC", None), ("[CH3][CH3]", None), ("", None)],
    ],
)
def test_what_a_string_is_instead_of_a_smiles(text, cause):
    assert oddity(text) == cause


def test_odd_outputs_are_counted_by_cause_and_a_strict_rule_leaves_them_out():
    odd = ["CCO and this is the answer", "CCO |$;;$|", "CCO\u200b", "[C][C][O]", "nan", "InChI=1S/CH4/h1H4", "CCO"]
    result, per_example = score("cap2mol", [""] * 7, ["CCO"] * 7, odd, fcd=False, n_bootstrap=20)
    found = result["metrics"]
    assert per_example["validity"].tolist() == [1, 1, 1, 1, 0, 0, 1]  # as the reference scripts have it
    assert per_example["exact_match"].tolist() == [1, 1, 1, 0, 0, 0, 1]
    assert per_example["validity_strict"].tolist() == per_example["exact_match_strict"].tolist() == [0] * 6 + [1]
    assert found["validity_strict"]["value"] == pytest.approx(1 / 7)
    causes = ("text_after", "cxsmiles", "non_ascii", "selfies", "missing_value", "inchi")
    assert [result["counts"][f"{cause}_prediction"] for cause in causes] == [1] * 6


def test_dummy_atoms_of_any_spelling_never_match_exactly():
    dummies = ["*CC", "[*]CC", "[1*]CC", "[*:1]CC", "[#0]CC"]
    result, per_example = score("cap2mol", [""] * 5, dummies, dummies, fcd=False, n_bootstrap=20)
    assert per_example["exact_match"].tolist() == [0] * 5 and per_example["canonical_match"].tolist() == [1] * 5
    assert result["counts"]["dummy_atom_prediction"] == 5
