"""scripts/evaluate.py as a user runs it: existing outputs, a model's, comparisons; what is written, and errors."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_nli, make_t5

from lmolt.files import read_table, write_table
from lmolt.prompts import CAP2MOL, MOL2CAP

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHARED = ROOT.parent / "shared" / "data"
PAIRS = [
    ("CCO", "It is an alcohol of two carbons."),
    ("CC(=O)O", "It is a carboxylic acid, the one of vinegar."),
    ("c1ccccc1", "It is an aromatic ring of six carbons."),
    ("CCN", "It is a primary amine."),
    ("CC#N", "It is a nitrile."),
    ("CCOC(C)=O", "It is an ester with the smell of glue."),
]
SYSTEMS = {  # outputs in the pairs' order: captions, molecules
    "plain": (["It is an alcohol."] * 6, ["CCO", "CCO", "CCO", "CCN", "CC", "not a molecule"]),
    "better": ([c for _, c in PAIRS[:5]] + [""], [m for m, _ in PAIRS[:4]] + ["", "CCOC(C)=O"]),
    "<b>bold</b>": (["<script>document.title = 'run'</script>"] * 6, ["C", "C(", "</script>", "CCC", "CC#N", "CCO"]),
}


@pytest.fixture(scope="session")
def evaluated(evaluate, tmp_path_factory):
    """A folder with one run for each of SYSTEMS, as the script writes it."""
    folder = tmp_path_factory.mktemp("evaluated")
    for i, (name, (captions, molecules)) in enumerate(SYSTEMS.items()):
        rows = []
        for j, (molecule, caption) in enumerate(PAIRS):
            both = (("mol2cap", molecule, caption, captions[j]), ("cap2mol", caption, molecule, molecules[j]))
            rows += [
                dict(zip(("id", "direction", "source", "reference", "prediction"), (str(j), *x), strict=True))
                for x in both
            ]
        write_table(rows, folder / f"{i}.jsonl")
        file = folder / f"{i}.jsonl"
        evaluate("--predictions", file, file, "--direction", "mol2cap", "cap2mol", "--output", folder / f"run{i}",
               "--name", name, "--n_bootstrap", 50, "--no_fcd", "--cache_dir", folder / "cache")  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def compared(evaluate, evaluated):
    """The folder of a comparison of the three, against the first; one has been trained and says what that took."""
    record = json.loads((evaluated / "run1" / "metrics.json").read_text())
    record["efficiency"] = {"wall_seconds": 1800, "tokens": 1_000_000, "gpu_energy_joules": None}
    (evaluated / "run1" / "metrics.json").write_text(json.dumps(record))
    evaluate(
        "--compare", *(evaluated / f"run{i}" for i in range(3)), "--output", evaluated / "all", "--n_bootstrap", 200
    )
    return evaluated / "all"


def test_what_a_run_leaves(evaluated):
    folder = evaluated / "run1"
    assert {path.name for path in folder.glob("[!.]*")} == {
        "predictions.parquet", "scores.parquet", "metrics.json", "report.md", "report.html",
        "figure1_distributions.png", "figure3_molecules.png", "figure4_captions.png",
    }  # fmt: skip
    record = json.loads((folder / "metrics.json").read_text())
    assert record["system"] == "better" and record["arguments"]["seed"] == 0 and "rdkit" in record["versions"]
    assert re.fullmatch("[0-9a-f]{64}", record["data"]["predictions_sha256"])
    captions, molecules = record["directions"]["mol2cap"], record["directions"]["cap2mol"]
    assert captions["n"] == molecules["n"] == 6
    assert captions["counts"]["empty_prediction"] == molecules["counts"]["empty_prediction"] == 1
    assert molecules["metrics"]["validity"]["value"] == pytest.approx(5 / 6)
    assert molecules["metrics"]["exact_match"]["value"] == pytest.approx(5 / 6)
    for part in (captions, molecules):
        for entry in part["metrics"].values():
            assert "absent" in entry or {"value", "ci95", "n", "convention"} <= set(entry)
    scores = read_table(folder / "scores.parquet")
    assert [row["id"] for row in scores] == [row["id"] for row in read_table(folder / "predictions.parquet")]
    assert "NOT comparable" in (folder / "report.md").read_text()  # no SciBERT tokenizer was given


def test_comparison_writes_the_papers_tables_and_figures(compared):
    names = {path.name for path in compared.iterdir()}
    for table in ("table1_mol2cap", "table2_cap2mol", "table3_mol2cap_differences", "table4_cap2mol_differences"):
        assert {f"{table}.csv", f"{table}.tex"} <= names
    assert {"table5_efficiency.csv", "table8_mol2cap_tests.csv", "figure2_win_rates.png", "report.html"} <= names
    for name in names:
        if name.endswith(".png"):
            assert (compared / name).read_bytes().startswith(b"\x89PNG")
    rows = {row["System"]: row for row in read_table(compared / "table4_cap2mol_differences.csv")}
    assert list(rows) == list(SYSTEMS)
    assert float(rows["better"]["Validity"]) == pytest.approx(5 / 6)
    assert rows["plain"]["Exact in brackets"] == "" and rows["better"]["Exact in brackets"].startswith("(+")
    assert [row["Wall (h)"] for row in read_table(compared / "table5_efficiency.csv")] == ["0.5"]
    tests = read_table(compared / "table9_cap2mol_tests.csv")
    assert all(float(t["p (Holm)"]) >= float(t["p"]) for t in tests if t["p"] != "nan")
    assert "**" in (compared / "report.md").read_text()


def test_the_report_needs_nothing_else_and_runs_nothing_of_the_users(compared):
    page = (compared / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "<b>bold" not in page and "<script>document.title" not in page
    assert page.count("<script") == page.count("</script>") == 2


def dom(page: Path, folder: Path) -> str:
    """The page's document after its scripts ran, as a headless Chromium has it."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(compared, tmp_path):
    steps = """
    const change = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
    const cards = () => [...document.querySelectorAll(".example h3")].map(h => h.textContent.replace("Example ", ""));
    const found = {title: document.title, start: cards()};
    found.markup = document.querySelectorAll("#cards script, #cards b b").length;
    byId("direction").value = "cap2mol"; byId("direction").dispatchEvent(new Event("change"));
    found.measures = [...byId("measure").options].map(o => o.textContent);
    change("system", "1");
    found.worst = cards();
    change("order", "best");
    found.best = cards();
    change("search", "GLUE");
    found.searched = cards();
    found.count = byId("count").textContent;
    found.drawn = document.querySelectorAll(".drawings img").length;
    const table = [...document.querySelectorAll("table.sortable")][1];
    const column = [...table.tHead.rows[0].cells].findIndex(c => c.textContent.startsWith("Validity"));
    const values = () => [...table.tBodies[0].rows].map(r => Number(r.cells[column].dataset.value));
    table.tHead.rows[0].cells[column].click(); found.down = values();
    table.tHead.rows[0].cells[column].click(); found.up = values();
    const own = [...document.querySelectorAll("table.conventions")].find(t => t.textContent.includes("Entailment"));
    const value = own.tHead.rows[0].cells[1];
    const last = () => [...own.tBodies[0].rows].slice(-2).map(r => r.cells[1].textContent);
    value.click(); found.absent = last(); value.click(); found.absent.push(...last());
    byId("theme").click(); found.theme = document.documentElement.dataset.theme;
    const box = document.createElement("pre");
    box.id = "found"; box.textContent = JSON.stringify(found); document.body.append(box);
    """
    page = (compared / "report.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("direct();\n</script>", f"direct();\n{steps}</script>"))
    document = dom(tmp_path / "page.html", tmp_path)
    found = re.search(r'<pre id="found">(.*?)</pre>', document, re.S)
    assert found, "the page's script stopped: " + document[-2000:]
    found = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["title"] == "3 systems compared"  # and not what a caption's script would have made of it
    assert sorted(found["start"]) == list("012345") and found["markup"] == 0
    assert found["measures"][0] == "Chr-F"
    assert found["worst"][0] == found["best"][-1] == "4"  # the empty output
    assert found["searched"] == ["5"] and found["count"].startswith("1 of 1 (6 scored")
    assert found["drawn"] >= 2
    assert found["down"] == sorted(found["down"], reverse=True) and found["up"] == sorted(found["up"])
    assert found["down"][0] == pytest.approx(5 / 6)
    assert found["absent"] == ["absent"] * 4  # last, whichever way is up
    assert found["theme"] in ("dark", "light")


def test_comparisons_that_make_no_sense(evaluate, evaluated, tmp_path):
    one, two = evaluated / "run0", evaluated / "run1"
    with pytest.raises(ValueError, match="'nobody' is not one of the systems: plain, better"):
        evaluate("--compare", one, two, "--baseline", "nobody", "--output", tmp_path)
    with pytest.raises(ValueError, match="two systems are called 'plain'; name them"):
        evaluate("--compare", one, one, "--output", tmp_path)
    with pytest.raises(FileNotFoundError, match="metrics.json is not there"):
        evaluate("--compare", one, tmp_path, "--output", tmp_path)
    with pytest.raises(ValueError, match="at least two"):
        evaluate("--compare", one, "--output", tmp_path)
    rows = [row for row in read_table(evaluated / "1.jsonl") if row["direction"] == "mol2cap"]
    rows[3]["reference"] = "something else"
    write_table(rows, tmp_path / "p.jsonl")
    evaluate("--predictions", tmp_path / "p.jsonl", "--direction", "mol2cap", "--output", tmp_path / "odd",
           "--n_bootstrap", 10, "--cache_dir", tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="mol2cap row 4: the reference is 'something else', but 'It is a primary"):
        evaluate("--compare", one, tmp_path / "odd", "--output", tmp_path / "all")
    write_table(rows[:-1], tmp_path / "odd" / "predictions.parquet")
    with pytest.raises(ValueError, match="is not the one metrics.json scored"):
        evaluate("--compare", one, tmp_path / "odd", "--output", tmp_path / "all")


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "o.tsv").write_text("description\tground truth\toutput\nx\tC1CC\tC\n")
    command = [sys.executable, "scripts/evaluate.py", "--predictions", tmp_path / "o.tsv", "--direction", "cap2mol"]
    done = subprocess.run([*command, "--output", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "o.tsv" in done.stderr and "C1CC" in done.stderr
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_place_that_cannot_be_written_to_is_found_first(evaluate, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is no folder that can be written to"):
        evaluate("--predictions", "none.tsv", "--direction", "cap2mol", "--output", tmp_path / "file" / "out")


def test_help_is_quick():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "scripts/evaluate.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--compare" in done.stdout
    assert time.monotonic() - start < 2


def test_a_killed_run_goes_on_where_it_was(evaluate, tiny_policy, tmp_path):
    output = tmp_path / "out"
    write_table([{"molecule": "C" * i, "caption": f"{i} carbons"} for i in range(1, 41)], tmp_path / "pairs.csv")
    shutil.copytree(tiny_policy, tmp_path / "model")
    (tmp_path / "model" / "efficiency.json").write_text('{"wall_seconds": 60}')  # as the trainer leaves it
    arguments = [
        "--model",
        tmp_path / "model",
        "--pairs",
        tmp_path / "pairs.csv",
        "--limit",
        24,
        "--max_new_tokens",
        16,
    ]
    arguments += ["--tokens_per_batch", 500, "--n_bootstrap", 10, "--no_fcd", "--output"]

    def keys():
        lines = [line for file in output.glob("journal/*.jsonl") for line in file.read_text().splitlines()]
        return [json.loads(line)["key"] for line in lines if line.endswith("}")]  # a kill may cut the last one off

    command = [sys.executable, "scripts/evaluate.py", *map(str, arguments), str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not keys() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(keys()) < 48 and not (output / "predictions.parquet").exists()
    evaluate(*arguments, output)
    assert len(keys()) == len(set(keys())) == 48  # 24 pairs, two directions, nothing translated twice
    rows = read_table(output / "predictions.parquet")
    assert [row["direction"] for row in rows] == ["mol2cap"] * 24 + ["cap2mol"] * 24
    evaluate(*arguments, tmp_path / "whole")
    assert read_table(tmp_path / "whole" / "predictions.parquet") == rows
    assert json.loads((output / "metrics.json").read_text())["efficiency"] == {"wall_seconds": 60}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data beside the checkout")
def test_the_official_scripts_numbers(evaluate, tmp_path):
    files = [SHARED / "lpm24" / f"{direction}_example.tsv" for direction in ("mol2cap", "cap2mol")]
    evaluate("--predictions", *files, "--direction", "mol2cap", "cap2mol", "--output", tmp_path / "out",
           "--text_tokenizer", SHARED / "scibert", "--nltk_data", SHARED / "nltk_data", "--n_bootstrap", 20,
           "--cache_dir", tmp_path)  # fmt: skip
    directions = json.loads((tmp_path / "out" / "metrics.json").read_text())["directions"]
    official = json.loads((SHARED / "lpm24" / "example_scores.json").read_text())
    ours = {"exact": "exact_match", "fcd_1_2_2": "fcd"}
    for direction in ("mol2cap", "cap2mol"):
        for key, value in official[f"{direction}_example.tsv"].items():
            if isinstance(value, float):
                tolerance = 1e-3 if key.startswith("fcd") else 1e-6
                assert directions[direction]["metrics"][ours.get(key, key)]["value"] == pytest.approx(
                    value, abs=tolerance
                ), key


def test_rows_whose_reference_is_no_molecule_can_be_left_out(evaluate, tmp_path, capsys):
    """Not counted as invalid outputs, as MolT5's scripts would: validity is that of the two rows that remain."""
    file = tmp_path / "o.tsv"
    file.write_text("description\tground truth\toutput\na\tCCO\tCCO\nb\tC1CC\tCC\nc\tCC\tC(\n")
    arguments = ["--predictions", file, "--direction", "cap2mol", "--no_fcd", "--n_bootstrap", 10]
    arguments += ["--cache_dir", tmp_path / "cache", "--output", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"o.tsv, cap2mol row 2: the reference 'C1CC' .*--invalid_pairs drop"):
        evaluate(*arguments)
    evaluate(*arguments, "--invalid_pairs", "drop")
    assert "left out: id 1, no molecule is its reference 'C1CC'" in capsys.readouterr().out
    part = json.loads((tmp_path / "out" / "metrics.json").read_text())["directions"]["cap2mol"]
    assert part["n"] == 2 and part["counts"]["unreadable_reference_dropped"] == 1
    assert part["metrics"]["validity"]["value"] == 0.5 and part["metrics"]["morgan"]["value"] == 1
    file.write_text("description\tground truth\toutput\nb\tC1CC\tCC\n")
    with pytest.raises(ValueError, match="RDKit reads none of its 1 references, such as 'C1CC'"):
        evaluate(*arguments, "--invalid_pairs", "drop")


def test_entailment_by_a_local_model(evaluate, tmp_path):
    rows = [("C", "a b", "a b"), ("CC", "the c", "d d"), ("CCC", "a", "")]
    table = ["SMILES\tground truth\toutput", *map("\t".join, rows), ""]
    (tmp_path / "o.tsv").write_text("\n".join(table))
    arguments = ["--predictions", tmp_path / "o.tsv", "--direction", "mol2cap", "--n_bootstrap", 20]
    (tmp_path / "nli").mkdir()
    make_nli(tmp_path / "nli", ["contradiction", "entailment", "neutral"])
    evaluate(*arguments, "--nli_model", tmp_path / "nli", "--output", tmp_path / "with")
    found = json.loads((tmp_path / "with" / "metrics.json").read_text())["directions"]["mol2cap"]["metrics"]
    assert 0 < found["nli_entailment"]["value"] < 2 / 3 and found["nli_entailment"]["n"] == 3  # the empty one counts 0
    assert str(tmp_path / "nli") in found["nli_entailment"]["convention"] and "value" in found["nli_win_rate"]
    report = (tmp_path / "with" / "report.md").read_text()
    assert "percentile of Entailment" in report and "Entailment needs --nli_model" not in report
    evaluate(*arguments, "--nli_model", tmp_path / "none", "--output", tmp_path / "without")
    found = json.loads((tmp_path / "without" / "metrics.json").read_text())["directions"]["mol2cap"]["metrics"]
    assert "could not be loaded" in found["nli_entailment"]["absent"] and "value" in found["rougeL"]


def test_an_entailment_model_without_label_names_is_found_before_translating(evaluate, tiny_policy, tmp_path):
    (tmp_path / "nli").mkdir()
    make_nli(tmp_path / "nli", ["LABEL_0", "LABEL_1", "LABEL_2"])
    (tmp_path / "pairs.jsonl").write_text('{"molecule": "CCO", "caption": "An alcohol."}\n')
    arguments = ["--model", tiny_policy, "--pairs", tmp_path / "pairs.jsonl", "--nli_model", tmp_path / "nli"]
    with pytest.raises(ValueError, match="id2label .*LABEL_0.* names no entailment label; write the names"):
        evaluate(*arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "journal").exists()


def test_a_sequence_to_sequence_model_and_a_quantised_one(evaluate, tiny_policy, tmp_path):
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from lmolt.generation.translate import load_translator
    from lmolt.prompts import build_prompt, encode_prompt

    def outputs(*arguments):
        evaluate(*arguments, "--pairs", tmp_path / "pairs.csv", "--max_new_tokens", 12, "--n_bootstrap", 5, "--no_fcd",
               "--output", tmp_path / "out")  # fmt: skip
        rows = read_table(tmp_path / "out" / "predictions.parquet")
        shutil.rmtree(tmp_path / "out")
        return [row["prediction"] for row in rows]

    def plain(model, tokenizer, prompts, causal):
        texts = []
        for prompt in prompts:
            made = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0]
            texts.append(tokenizer.decode(made[len(prompt) * causal :], skip_special_tokens=True).strip())
        return texts

    write_table([{"molecule": m, "caption": c} for m, c in PAIRS], tmp_path / "pairs.csv")
    sources = [*((MOL2CAP, m) for m, _ in PAIRS), *((CAP2MOL, c) for _, c in PAIRS)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    make_t5(tiny_policy, tmp_path / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5").eval()
    expected = plain(model, tokenizer, [tokenizer(text)["input_ids"] for _, text in sources], causal=False)
    assert outputs("--model", tmp_path / "t5") == expected and len(set(expected)) > 2
    model, _ = load_translator(str(tiny_policy), load_in_4bit=True)
    expected = plain(
        model, tokenizer, [encode_prompt(tokenizer, build_prompt(*source)) for source in sources], causal=True
    )
    made = outputs("--model", tiny_policy, "--load_in_4bit")
    same = sum(a == b for a, b in zip(made, expected, strict=True))
    assert same >= len(expected) - 3 and len(set(expected)) > 2  # in bf16 a batch rounds otherwise: near ties may turn
    with pytest.raises(ValueError, match="encoder-decoder"):
        outputs("--model", tmp_path / "t5", "--load_in_4bit")


def test_sources_without_references_and_the_round_trip(evaluate, tiny_policy, tmp_path):
    """A list of SMILES in; captions and what needs no gold out, in a report without a page of zeros."""
    (tmp_path / "smiles.txt").write_text("".join(f"{molecule}\n" for molecule, _ in PAIRS))
    evaluate("--model", tiny_policy, "--pairs", tmp_path / "smiles.txt", "--no_references", "--directions", MOL2CAP,
           "--round_trip", "--max_new_tokens", 4, "--n_bootstrap", 20, "--output", tmp_path / "out")  # fmt: skip
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())["directions"][MOL2CAP]
    assert record["counts"]["no_reference"] == 6 and record["counts"]["truncated"] > 0
    valued = {key for key, entry in record["metrics"].items() if "value" in entry}
    assert {"round_trip_validity", "round_trip_exact", "round_trip_morgan", "group_unclaimed"} <= valued
    assert not {"bleu2", "rouge1", "meteor_stem", "delta_len"} & record["metrics"].keys()
    assert "translated back by" in record["metrics"]["round_trip_exact"]["convention"]
    assert str(tiny_policy) in record["metrics"]["round_trip_exact"]["convention"]
    rows = read_table(tmp_path / "out" / "predictions.parquet")
    assert [row["source"] for row in rows] == [m for m, _ in PAIRS] and rows[0]["reference"] is None
    assert "returned" in rows[0] and "BLEU" not in (tmp_path / "out" / "report.md").read_text()


def test_outputs_alone_are_scored_by_what_needs_nothing_else(evaluate, tmp_path):
    (tmp_path / "o.txt").write_text("CCO\nC(\n\nCCN extra\nCCO\n")
    (tmp_path / "known.csv").write_text("molecule\nOCC\n")
    evaluate("--predictions", tmp_path / "o.txt", "--direction", CAP2MOL, "--no_references", "--n_bootstrap", 20,
           "--novelty", tmp_path / "known.csv", "--output", tmp_path / "out")  # fmt: skip
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())["directions"][CAP2MOL]
    values = {key: entry["value"] for key, entry in record["metrics"].items() if "value" in entry}
    assert values == {
        "validity": pytest.approx(3 / 5),
        "validity_strict": pytest.approx(2 / 5),
        "uniqueness": pytest.approx(2 / 3),
        "novelty": pytest.approx(1 / 3),
    }
    assert record["counts"]["text_after_prediction"] == 1


def test_a_comparison_leaves_out_by_name_what_was_scored_under_other_conventions(evaluate, evaluated, tmp_path):
    rows = [row for row in read_table(evaluated / "1.jsonl") if row["direction"] == CAP2MOL]
    write_table(rows, tmp_path / "p.jsonl")
    for name, more in (("a", ()), ("b", ("--chrf_threshold", 0.9))):
        evaluate("--predictions", tmp_path / "p.jsonl", "--direction", CAP2MOL, "--output", tmp_path / name,
               "--n_bootstrap", 20, "--no_fcd", *more)  # fmt: skip
    evaluate("--compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "ab", "--n_bootstrap", 20)
    tested = {row["Metric"] for row in read_table(tmp_path / "ab" / "table9_cap2mol_tests.csv")}
    assert "Chr-F" in tested and "Wins" not in tested
    assert "Wins was scored under several conventions" in (tmp_path / "ab" / "report.md").read_text()


def test_one_file_a_direction(tmp_path, evaluate):
    with pytest.raises(ValueError, match="a direction's outputs are one file"):
        evaluate("--predictions", "a.txt", "b.txt", "--direction", CAP2MOL, CAP2MOL, "--output", tmp_path / "o")
