"""Caption metrics against NLTK and rouge-score, and against the official scripts' numbers on real outputs."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_nli

from lmolt.metrics import caption, compare, ngrams, properties, score
from lmolt.metrics.hallucination import GROUPS, entailment, entailment_label, groups_claimed, groups_present
from lmolt.metrics.meteor import WordNet, meteor

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "lpm24").is_dir(), reason="needs shared/data/lpm24 beside the checkout")
HELD_OUT = """low driving voltage | organic light-emitting diode
jnk inhibitor | type 2 diabetes treatment
immunomodulator | protein tyrosine kinase inhibitor
Membrane stabilizer | wood
autoimmune disease treatment | jak inhibitor
Flavoring agent | cinnamon
anti retroviral | hiv replication inhibitor
bitter | odorless
meaty | savory
autoimmune disease treatment | tyrosine kinase inhibitor
floral | spicy
Emulsifier | herb
electronic device | luminescent
anti depressant | monoamine reuptake inhibitor
cardiovascular treatment | pde4 inhibitor
autoimmune disease treatment | immunomodulator
luminescent | organic electroluminescent
organic electroluminescent | organic electroluminescent material
Energy storage | flavor
Energy source | wood
light emission | organic light-emitting diode
thrombin inhibitor | thrombosis treatment
flavor | nutrient"""
REFERENCES = [
    "The molecule is a primary alcohol. It has a role as a solvent.",
    "The molecule is an aromatic ether and a pyridine.",
    "It is a member of the thyroxine treatment class and affects metabolic syndrome.",
    "a b c d",
]
PREDICTIONS = [
    "The molecule is a primary amine that has roles as solvents.",
    "The molecules are aromatic ethers; a pyridine ring.",
    "The molecule impacts metabolic syndrome, a treatment of the class.",
    "",
]


def read(name: str) -> tuple[list, list, list]:
    lines = (SHARED / "lpm24" / name).read_text(encoding="utf-8").split("\n")[1:]
    return tuple(map(list, zip(*(line.split("\t") for line in lines if line), strict=True)))


@needs_shared
def test_official_scores_of_real_captions(tmp_path):
    expected = json.loads((SHARED / "lpm24/example_scores.json").read_text())["mol2cap_example.tsv"]
    molecules, references, predictions = read("mol2cap_example.tsv")
    shutil.copy(SHARED / "lpm24/nested_props.json", tmp_path)
    # Of L+M-24's 1,281 held-out pairs, those that the 199 references may name (all the others add only to TN).
    pairs = [tuple(pair.split(" | ")) for pair in HELD_OUT.split("\n")]
    (tmp_path / "train_withheld_combos.txt").write_text("".join(f"{pair}\t1\n" for pair in pairs))
    result, per_example = score(
        "mol2cap",
        molecules,
        references,
        predictions,
        text_tokenizer=SHARED / "scibert",
        nltk_data=SHARED / "nltk_data",
        property_tree=tmp_path,
        num_workers=1,
    )
    found = result["metrics"]
    for key in ("bleu2", "bleu4", "meteor", "rouge1", "rouge2", "rougeL"):
        assert found[key]["value"] == pytest.approx(expected[key], abs=1e-6)
        low, high = found[key]["ci95"]
        assert low < found[key]["value"] < high and found[key]["n"] == 199
    for key, value in expected["property_overall_new_code"].items():
        assert found[f"property_{key}"]["value"] == pytest.approx(value, abs=1e-6)
    for key, value in expected["property_overall_old_code_equals_authors_eval_tmp_txt"].items():
        assert found[f"property_{key}_empty0"]["value"] == pytest.approx(value, abs=1e-6)
    assert "property_f1/Biomedical/antis" in found
    combinations = {key: per_example[f"stat_combination_{key.lower()}"].sum() for key in ("TP", "FP", "FN")}
    assert combinations == {key: expected["combos"][key] for key in combinations}
    assert found["combination_recall"]["value"] == 0 and "absent" in found["combination_precision"]
    assert all(len(column) == 199 for column in per_example.values())


@needs_shared
def test_official_counts_of_held_out_combinations(tmp_path):
    source = next((f for f in (SHARED / "lpm24").glob("*withheld_combos.txt")), None)
    if source is None:
        pytest.skip("needs train_withheld_combos.txt of L+M-24's additional_data.zip in shared/data/lpm24")
    expected = json.loads((SHARED / "lpm24/example_scores.json").read_text())["mol2cap_example.tsv"]["combos"]
    _, references, predictions = read("mol2cap_example.tsv")
    _, per_example = properties.score(references, predictions, SHARED / "lpm24", SHARED / "scibert", 10, 0)
    sums = {key: per_example[f"stat_combination_{key.lower()}"].sum() for key in ("TP", "FP", "FN")}
    sums["TN"] = per_example["stat_combination_pairs"].sum() - sum(sums.values())
    assert sums == expected


def test_property_tree_by_hand(tmp_path):
    (tmp_path / "nested_props.json").write_text(json.dumps({"A": ["red", {"B": ["green", "pale blue"]}], "C": ["x"]}))
    (tmp_path / "withheld_combos.txt").write_text("('red', 'green')\t1\n('red', 'pale blue')\t2\n")
    references = ["red and green", "pale blue", "red"]
    predictions = ["red", "pale green blue", "red pale blue"]
    metrics, per_example = properties.score(references, predictions, tmp_path, None, 50, 0)
    # red: 2 hits; green: 1 missed, 1 surplus; pale blue: 1 missed, 1 surplus; nobody names x.
    assert metrics["property_f1/A/B"][0] == 0
    assert metrics["property_f1/A"][0] == 0.5
    assert metrics["property_f1"][0] == 0.75 and metrics["property_f1_empty0"][0] == 0.25
    assert metrics["property_accuracy/A"][0] == pytest.approx((1 + 1 / 3) / 2)
    assert per_example["stat_combination_fn"].tolist() == [1, 0, 0]
    assert per_example["stat_combination_fp"].tolist() == [0, 0, 1]
    assert per_example["property_example_recall"].tolist() == [0.5, 0, 1]


def test_bleu_and_rouge_equal_nltk_and_rouge_score():
    from nltk.translate.bleu_score import corpus_bleu
    from rouge_score.rouge_scorer import RougeScorer

    rng = random.Random(0)
    texts = [[" ".join(rng.choices("abcdE", k=rng.randint(0, 12))) for _ in range(80)] for _ in range(2)]
    pieces, _ = caption.word_pieces([*texts[0], *texts[1]], str.split)
    columns = caption.bleu_columns(ngrams.flatten(pieces[:80]), ngrams.flatten(pieces[80:]))
    sums = np.array([columns[name].sum() for name in caption.BLEU_COLUMNS])
    words = [[text.split() for text in side] for side in texts]
    for order in (1, 2, 3, 4):
        expected = corpus_bleu([[r] for r in words[0]], words[1], weights=(1 / order,) * order)
        assert caption.bleu_of_sums(sums, order) == pytest.approx(expected, abs=1e-12)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = caption.rouge(*texts)
    for i, (reference, prediction) in enumerate(zip(*texts, strict=True)):
        for key, expected in scorer.score(prediction, reference).items():
            assert found[key][i] == pytest.approx(expected.fmeasure, abs=1e-12)


@pytest.mark.skipif(not (SHARED / "nltk_data").is_dir(), reason="needs WordNet in shared/data/nltk_data")
def test_meteor_and_wordnet_equal_nltk():
    import nltk

    nltk.data.path.insert(0, str(SHARED / "nltk_data"))
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    ours = WordNet(SHARED / "nltk_data")
    vocabulary = (SHARED / "scibert/vocab.txt").read_text(encoding="utf-8").split("\n")[:-1:12]
    for word in [*vocabulary, "geese", "worse", "less", "", "b|c"]:
        lemmas = (lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas())
        assert ours.synonyms(word) == {name for name in lemmas if "_" not in name}, word
    words = lambda text: text.replace(".", " .").split()
    pieces, names = caption.word_pieces([*REFERENCES, *PREDICTIONS], words)
    found = meteor(ngrams.flatten(pieces[:4]), ngrams.flatten(pieces[4:]), names, ours)
    pairs = [(words(r), words(p)) for r, p in zip(REFERENCES, PREDICTIONS, strict=True)]
    assert found["meteor"] == pytest.approx([meteor_score([r], p) for r, p in pairs], abs=1e-12)


def test_meteor_of_stems_is_nltks_with_a_wordnet_that_knows_no_word():
    from nltk.translate.meteor_score import meteor_score

    class Empty:
        def synsets(self, word):
            return []

    words = lambda text: text.replace(".", " .").split()
    pieces, names = caption.word_pieces([*REFERENCES, *PREDICTIONS], words)
    found = meteor(ngrams.flatten(pieces[:4]), ngrams.flatten(pieces[4:]), names)
    pairs = [(words(r), words(p)) for r, p in zip(REFERENCES, PREDICTIONS, strict=True)]
    assert list(found) == ["meteor_stem"]
    expected = [meteor_score([r], p, wordnet=Empty()) for r, p in pairs]
    assert found["meteor_stem"] == pytest.approx(expected, abs=1e-12) and min(expected[:3]) > 0.2


@needs_shared
def test_tokenizer_equals_transformers():
    from transformers import AutoTokenizer

    texts = [*REFERENCES, "Naïve 中文\tα-D-Glucose [SEP] (1→4)", "x" * 300, " ", "word " * 700, "a\x1cb\u3000c"]
    found, names = caption.word_pieces(texts, SHARED / "scibert")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "scibert")
    for text, pieces in zip(texts, found, strict=True):
        expected = tokenizer(text, add_special_tokens=False, truncation=True, max_length=512)["input_ids"]
        assert [names[i] for i in pieces] == [t for t in tokenizer.convert_ids_to_tokens(expected) if t != "[SEP]"]


def test_special_pieces_in_a_text_count_among_its_first_512():
    """The reference scripts truncate and only then filter: 600 pieces with two [SEP] leave 510 for BLEU."""
    prediction = "[SEP] [SEP] " + "a " * 598
    result, columns = score("mol2cap", ["C"], ["a"], [prediction], text_tokenizer=str.split, num_workers=1)
    assert columns["stat_bleu_len_pred"] == [510] and result["metrics"]["delta_len"]["value"] == 597


def test_what_is_missing_is_absent_with_its_reason(tmp_path):
    result, per_example = score("mol2cap", ["C"] * 4, REFERENCES, PREDICTIONS, nltk_data=tmp_path, n_bootstrap=50)
    found = result["metrics"]
    assert "nltk.downloader wordnet" in found["meteor"]["absent"] and "meteor" not in per_example
    assert "--nli_model" in found["nli_win_rate"]["absent"]
    assert "NOT comparable" in found["bleu4"]["convention"]
    assert result["counts"]["empty_prediction"] == 1
    reason = score("mol2cap", ["C"], ["a"], ["b"], nli_model=str(tmp_path / "none"))[0]["metrics"]["nli_entailment"]
    assert "could not be loaded" in reason["absent"]


@pytest.mark.parametrize("predictions", [["a b"], [""], ["x" * 10_000_000], ["x " * 50_000]])
def test_one_row(predictions):
    found = score("mol2cap", ["not a molecule"], ["a b"], predictions, n_bootstrap=20)[0]["metrics"]
    assert found["rouge1"]["value"] == (1 if predictions == ["a b"] else 0)
    assert found["delta_len"]["n"] == 1


def test_outputs_that_are_no_captions_are_counted():
    odd = ["nan", "17", "['an alcohol', 'b']", "<pad> an alcohol</s>", "an alcohol", ""]
    result, per_example = score("mol2cap", ["CCO"] * 6, ["an alcohol"] * 6, odd, n_bootstrap=20)
    causes = ("missing_value", "number", "list", "special_token")
    assert [result["counts"][f"{cause}_prediction"] for cause in causes] == [1] * 4
    assert per_example["count_special_token_prediction"].tolist() == [0, 0, 0, 1, 0, 0]


def test_users_mistakes():
    with pytest.raises(ValueError, match="'predictions': 0"):
        score("mol2cap", ["C"], ["a"], [])
    with pytest.raises(ValueError, match="row 2: the reference is nan"):
        score("mol2cap", ["C", "C"], ["a", float("nan")], ["a", "b"])
    assert score("mol2cap", ["C"], ["a"], [float("nan")], n_bootstrap=5)[0]["counts"]["missing_prediction"] == 1
    with pytest.raises(FileNotFoundError, match="no tokenizer could be loaded from 'nowhere/at_all'"):
        score("mol2cap", ["C"], ["a"], ["a"], text_tokenizer="nowhere/at_all")


def test_functional_groups():
    claims = lambda text: {g for g, said in zip(GROUPS, groups_claimed(text), strict=True) if said}
    has = lambda smiles: {g for g, there in zip(GROUPS, groups_present(smiles), strict=True) if there}
    assert claims("It is a primary alcohol, an aromatic ether and a monocarboxylic acid amide.") == {
        *("alcohol", "ether", "amide"),
    }
    assert claims("It is an amino acid. It derives from a nonanoic acid ester.") == set()
    assert has("CC(=O)Oc1ccccc1C(=O)O") == {"carboxylic acid", "ester", "benzene ring"}
    assert groups_present("C(") is None
    references = ["a ketone", "an ester"]
    found = score("mol2cap", ["CC(C)=O", "CCO"], references, ["a nitrile and a ketone", "x"])[1]
    assert found["group_hallucination"][0] == 0.5 and np.isnan(found["group_hallucination"][1])
    assert found["group_hallucination_reference"].tolist() == [0, 1]
    assert found["group_missed"][0] == 0


@pytest.mark.parametrize("labels", [["entailment", "neutral", "contradiction"], ["CONTRADICTION", "ENTAILMENT", "N"]])
def test_nli_reads_the_label_order(tmp_path, labels):
    import torch
    from transformers import BertTokenizerFast, DebertaForSequenceClassification

    model = DebertaForSequenceClassification.from_pretrained(make_nli(tmp_path, labels)).eval()
    references, predictions = ["a b", "the a", "d", "a " * 100], ["b c", "", "c d a b", "b"]
    probability, wins = entailment(references, predictions, str(tmp_path))
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path)
    for i in (0, 2, 3):
        inputs = tokenizer(references[i], predictions[i], truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0].softmax(-1)
        label = [name.lower() for name in labels].index("entailment")
        assert probability[i] == pytest.approx(expected[label].item(), abs=1e-5)
        assert wins[i] == (expected.argmax().item() == label)
    assert probability[1] == wins[1] == 0
    found = score("mol2cap", ["C"] * 4, references, predictions, nli_model=str(tmp_path), n_bootstrap=20)[0]
    assert found["metrics"]["nli_entailment"]["value"] == pytest.approx(probability.mean())


def test_nli_labels_without_names_are_an_error():
    assert entailment_label({0: "not_entailment", 1: "entailment"}, "m") == 1
    with pytest.raises(ValueError, match="names no entailment label"):
        entailment_label({0: "LABEL_0", 1: "LABEL_1"}, "m")


def test_compare_is_paired():
    good = score("mol2cap", ["C"] * 4, REFERENCES, REFERENCES)[1]
    poor = score("mol2cap", ["C"] * 4, REFERENCES, PREDICTIONS)[1]
    found = compare("mol2cap", good, poor)
    low, high = found["rouge1"]["ci95"]
    assert found["rouge1"]["difference"] == pytest.approx(1 - poor["rouge1"].mean()) and low > 0 and high <= 1
    assert found["bleu2"]["p"] < 0.01
    same = compare("mol2cap", poor, poor)
    assert all(f["difference"] == 0 and f["p"] == 1 for f in same.values())
    with pytest.raises(ValueError, match="same rows"):
        compare("mol2cap", good, {key: value[:2] for key, value in poor.items()})


def test_numbers_are_words_of_rouge():
    assert caption.rouge(["3 rings"], ["4 rings"])["rouge1"].tolist() == [0.5]
