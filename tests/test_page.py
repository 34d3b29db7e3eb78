"""The page in a real browser: typed, drawn and clicked, a bad input, a long one, a file; nothing from elsewhere."""

import importlib.util
import json
import shutil

import pytest
from conftest import ROOT

from lmolt import Translator
from lmolt.files import read_table
from lmolt.generation.drawing import table
from lmolt.prompts import CAP2MOL, MOL2CAP

missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
missing += [] if shutil.which("chromium") else ["chromium"]


def test_what_is_shown_of_a_candidate(tiny_policy):
    translator = Translator(str(tiny_policy))
    found = translator(["CCO", "C1CC"], MOL2CAP, max_new_tokens=4)
    found[0].output = "<script>alert(1)</script> an alcohol and a nitrile"
    html = found._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "RDKit can&#x27;t read this molecule" in html
    assert "<th>molecule</th>" not in html  # of captions, which are no molecules
    assert "✓ alcohol" in html and "✗ nitrile" in html and html.count("<svg") == 1
    (molecule,) = translator(["A molecule with rings."], CAP2MOL, max_new_tokens=4)
    molecule.valid, molecule.smiles = True, "c1ccccc1"
    drawn = table([molecule])
    assert "<svg" in drawn and ">valid<" in drawn and "<th>molecule</th>" in drawn


def test_the_notebook_runs(tiny_policy):
    """Its cells in order, with a tiny model in the place of the demo's; what each shows is HTML or has a text."""
    shown, names = [], {}
    for cell in json.loads((ROOT / "docs" / "translate.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            code = "".join(cell["source"]).replace(
                '"runs/demo/models/cap2mol", "runs/demo/cpo"', repr(str(tiny_policy))
            )
            *lines, last = code.rstrip().split("\n")
            exec("\n".join(lines), names)
            if " = " in last.partition("(")[0]:
                exec(last, names)
            else:
                shown.append(eval(last, names))
    assert shown[1]["inputs"] == 1 and shown[1]["candidates"] == 8
    assert shown[0]._repr_html_().startswith("<div") and "<svg" in shown[2]._repr_html_()


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=f"the page's test needs {', '.join(missing)}")
def test_the_page_in_a_browser(tiny_policy, tmp_path):
    from playwright.sync_api import sync_playwright

    from lmolt.generation.page import build, examples_of

    pairs = tmp_path / "pairs.csv"
    pairs.write_text("molecule,caption\nCCO,An alcohol of two carbons.\n")
    page, how = build(Translator(str(tiny_policy)), examples_of(str(pairs)), max_new_tokens=8)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **how)
    assert url.startswith("http://127.0.0.1:")
    outside, errors = [], []
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1280, "height": 1000})
            tab.set_default_timeout(60_000)
            local = (url, "data:", "blob:")
            tab.on("request", lambda r: None if r.url.startswith(local) else outside.append(r.url))
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.goto(url)
            tab.wait_for_function("() => window.sketch")
            box, answer = tab.locator("#smiles textarea, #smiles input").first, tab.locator("#captions")

            # drawn: a bond by the mouse, which the server captions
            for _ in range(10):  # until the page has come to rest, the editor may move, or not listen yet
                place = tab.locator("#sketch").bounding_box()
                tab.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
                tab.wait_for_timeout(5000)
                if box.input_value():
                    break
            assert box.input_value() == "CC"
            tab.click("#caption-it")
            tab.wait_for_selector("#captions path.bond-0", state="attached")  # a level line has no height

            # typed: no molecule
            box.fill("C1CC")
            tab.click("#caption-it")
            tab.wait_for_selector("#captions .refused")
            assert "RDKit can't read this molecule" in answer.inner_text()

            # an example of the pairs, ranked by both directions
            tab.locator("button", has_text="CCO").first.click()
            tab.get_by_label("rank").first.click()
            tab.get_by_role("option", name="channel").click()
            tab.click("#caption-it")
            tab.wait_for_selector("#captions table")
            assert "CCO" in answer.inner_text() and "back -" in answer.inner_text()

            # a file, and what is made of it
            given = tmp_path / "in.csv"
            given.write_text("id,molecule\na,CCO\nb,C1CC\n")
            tab.get_by_role("tab", name="File").click()
            tab.locator("#upload input[type=file]").set_input_files(given)
            tab.wait_for_selector("#upload a")
            tab.click("#translate-file")
            with tab.expect_download() as download:
                tab.locator("#made a").first.click()
            assert "2 inputs" in tab.locator("#said").inner_text()
            rows = read_table(shutil.copy(download.value.path(), tmp_path / "made.csv"))
            assert {(row["id"], row["note"]) for row in rows} == {("a", ""), ("b", "RDKit can't read this molecule")}

            # a caption, and one that is far too long
            tab.get_by_role("tab", name="Caption to molecules").click()
            tab.set_viewport_size({"width": 400, "height": 900})
            text = tab.locator("#text textarea")
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
            text.evaluate("box => box.removeAttribute('maxlength')")
            text.fill("word " * 10_000)
            tab.click("#find-molecules")
            tab.wait_for_selector("#molecules .refused")
            assert "over 20,000 characters" in tab.locator("#molecules").inner_text()
            browser.close()
    finally:
        page.close()
    assert outside == [] and errors == []
