"""A page for one translator, on this machine only: `python scripts/translate.py --serve --model ...`.

Gradio (the extra `page`) serves it; molecules are drawn in OpenChemLib's editor, which comes along in editor/ (version
9.25.0, BSD-3-Clause, editor/LICENSE). The page fetches nothing from elsewhere, and the server asks nobody.
"""

import os
import random
import tempfile
from html import escape
from pathlib import Path

from lmolt.data.pairs import read_pairs
from lmolt.data.sources import INPUTS, read_sources, write_translations
from lmolt.generation.candidates import LONGEST, RANKS
from lmolt.generation.drawing import table
from lmolt.generation.translator import Translator
from lmolt.prompts import CAP2MOL, MOL2CAP

EDITOR = Path(__file__).with_name("editor")
MOST_ROWS, MOST_CANDIDATES, FILE_SIZE = 10_000, 32, "10mb"
EXAMPLES = {
    MOL2CAP: ["CC(=O)Nc1ccc(O)cc1", "CCOC(=O)c1ccccc1", "NCCS(=O)(=O)O"],
    CAP2MOL: ["The molecule is a carboxylic acid with a benzene ring.", "The molecule has two nitro groups."],
}
# The editor writes each change into the text box, as if it were typed.
_HEAD = """<script type="module">
import {{ CanvasEditor, Molecule, Resources }} from "{folder}/openchemlib.js";
await Resources.registerFromUrl("{folder}/resources.json");
const wait = () => {{
  const place = document.querySelector("#sketch");
  if (!place || !place.offsetWidth) return setTimeout(wait, 200);
  const editor = new CanvasEditor(place);
  window.sketch = editor;
  editor.setOnChangeListener((event) => {{
    if (event.type !== "molecule" || !event.isUserEvent) return;
    const box = document.querySelector("#smiles textarea, #smiles input");
    box.value = editor.getMolecule().toIsomericSmiles();
    box.dispatchEvent(new Event("input", {{ bubbles: true }}));
  }});
}};
wait();
</script>"""


def build(translator: Translator, examples: dict[str, list[str]] | None = None, **options):
    """The Gradio page and what its `launch` takes. `options` go to each translation."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # before the import
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError(f"the page needs Gradio: pip install 'lmolt[page]' ({error})") from None

    examples = EXAMPLES | (examples or {})

    def shown(direction: str, text: str, n: int, valid_only: bool, rank: str) -> str:
        try:
            how = {"num_candidates": max(1, min(int(n), MOST_CANDIDATES)), "valid_only": valid_only, "rank": rank}
            return table(translator((text or "")[: LONGEST + 1], direction, **how, **options))
        except (ValueError, OSError) as error:
            return f'<p class="refused">{escape(str(error)[:500])}</p>'

    def of_file(path: str | None, direction: str, column: str, n: int, valid_only: bool, rank: str):
        try:
            if not path:
                raise ValueError(f"choose a file: {', '.join(INPUTS)}")
            wanted = None if direction == "find out" else direction
            sources = read_sources(Path(path), column.strip() or None, wanted)
            if len(sources.texts) > MOST_ROWS:
                raise ValueError(
                    f"{len(sources.texts):,} rows, and the page takes {MOST_ROWS:,}; scripts/translate.py takes all"
                )
            how = {"num_candidates": max(1, min(int(n), MOST_CANDIDATES)), "valid_only": valid_only, "rank": rank}
            found = translator(sources.texts, wanted or sources.direction, **how, **options)
            out = Path(tempfile.mkdtemp(prefix="lmolt-")) / "translations.csv"
            rows = found.rows()
            if sources.ids:
                rows = [{"row": row["row"], "id": sources.ids[row["row"] - 1]} | row for row in rows]
            write_translations(rows, out)
            said = ", ".join(f"{count} {what}" for what, count in found.counts.items())
            return escape(said), str(out)
        except (ValueError, OSError) as error:
            return f'<p class="refused">{escape(str(error)[:500])}</p>', None

    def settings():
        n = gr.Slider(1, MOST_CANDIDATES, value=4, step=1, label="candidates")
        valid = gr.Checkbox(True, label="valid only")
        return [n, valid, gr.Dropdown(list(RANKS), value="logp", label="rank")]

    gr.set_static_paths([EDITOR])
    with gr.Blocks(title="LMolT", analytics_enabled=False) as page:
        gr.Markdown(
            "# LMolT\nOutputs of a model: captions may claim what isn't there, molecules may be others than meant."
        )
        with gr.Tab("Molecule to caption"):
            gr.HTML('<div id="sketch" style="width:100%;height:380px;border:1px solid #ccc"></div>')
            smiles = gr.Textbox(label="SMILES", elem_id="smiles", max_length=LONGEST)
            gr.Examples(examples[MOL2CAP], smiles)
            how = settings()
            asked = gr.Button("Caption it", elem_id="caption-it", variant="primary")
            captions = gr.HTML(elem_id="captions")
            asked.click(lambda *given: shown(MOL2CAP, *given), [smiles, *how], captions)
        with gr.Tab("Caption to molecules"):
            text = gr.Textbox(label="Caption", elem_id="text", lines=3, max_length=LONGEST)
            gr.Examples(examples[CAP2MOL], text)
            how = settings()
            asked = gr.Button("Find molecules", elem_id="find-molecules", variant="primary")
            molecules = gr.HTML(elem_id="molecules")
            asked.click(lambda *given: shown(CAP2MOL, *given), [text, *how], molecules)
        with gr.Tab("File"):
            file = gr.File(label=", ".join(INPUTS), file_types=list(INPUTS), type="filepath", elem_id="upload")
            direction = gr.Dropdown(["find out", MOL2CAP, CAP2MOL], value="find out", label="direction")
            column = gr.Textbox(label="column of a table")
            how = settings()
            asked = gr.Button("Translate", elem_id="translate-file", variant="primary")
            said, made = gr.HTML(elem_id="said"), gr.File(label="translations", elem_id="made")
            asked.click(of_file, [file, direction, column, *how], [said, made])
    page.queue(max_size=16, default_concurrency_limit=1)
    font = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    return page, {
        "server_name": "127.0.0.1",
        "share": False,
        "head": _HEAD.format(folder=f"/gradio_api/file={EDITOR}"),
        "footer_links": [],
        "ssr_mode": False,
        "max_file_size": FILE_SIZE,
        "theme": gr.themes.Default(**font),
    }


def examples_of(pairs: str) -> dict[str, list[str]]:
    """Three of each kind of the pairs' test split, of those that a line shows."""
    found = [p for p in read_pairs(pairs, default_split="test") if len(p["molecule"]) < 80 and len(p["caption"]) < 400]
    chosen = random.Random(0).sample(found, min(3, len(found)))
    return {MOL2CAP: [p["molecule"] for p in chosen], CAP2MOL: [p["caption"] for p in chosen]} if chosen else {}


def serve(translator: Translator, port: int | None = None, pairs: str | None = None, **options) -> None:
    """Serve the page until Ctrl-C, with examples of `pairs`; prints where it is."""
    page, how = build(translator, examples_of(pairs) if pairs else None, **options)
    page.launch(server_port=port, **how)
