"""Candidates as HTML: molecules drawn by RDKit, claims of captions marked. All text is escaped."""

from html import escape

from lmolt.generation.candidates import Candidate, claims
from lmolt.metrics.workers import Unfinished, in_processes
from lmolt.prompts import MOL2CAP

SHOWN = 500  # characters of a text


def svg(smiles: str, width: int = 220, height: int = 160) -> str:
    """A drawing, or an empty text where RDKit makes none."""
    (found,) = in_processes(_svg, [f"{width} {height} {smiles}"])
    return "" if isinstance(found, Unfinished) else found


def _svg(job: str) -> str:
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    width, height, smiles = job.split(" ", 2)
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        return ""
    drawer = rdMolDraw2D.MolDraw2DSVG(int(width), int(height))
    rdMolDraw2D.PrepareAndDrawMolecule(drawer, molecule)
    drawer.FinishDrawing()
    return drawer.GetDrawingText().partition("?>")[2]


def groups(caption: str, smiles: str) -> str:
    """The functional groups that a caption claims, each marked as there or not."""
    mark = lambda has: ("#1a7f37", "✓", "there") if has else ("#b42318", "✗", "not there")
    parts = []
    for name, has in claims(caption, smiles).items():
        colour, sign, word = mark(has)
        parts.append(f'<span class="claim" style="color:{colour}" title="{word}">{sign} {escape(name)}</span>')
    return ", ".join(parts) or "no group that is checked"


def table(candidates: list[Candidate]) -> str:
    """A row a candidate: rank, molecule where outputs are some, text, log-probability, validity or claims."""
    cut = lambda text: escape(text if len(text) <= SHOWN else text[:SHOWN] + " ...")
    rows, before = [], None
    drawn_outputs = any(c.direction != MOL2CAP for c in candidates)
    names = ["rank", *["molecule"] * drawn_outputs, "output", "log p", "groups" if not drawn_outputs else ""]
    across = f'colspan="{len(names)}" style="text-align:left"'
    for c in candidates:
        if c.row != before:
            drawn = svg(c.smiles) if c.direction == MOL2CAP and c.smiles else ""
            rows.append(f"<tr><td {across}><b>{c.row}</b> {cut(c.input)}{drawn}</td></tr>")
            before = c.row
        if c.rank is None:
            rows.append(f"<tr><td {across}><i>{escape(c.note)}</i></td></tr>")
            continue
        said = groups(c.output, c.smiles) if c.direction == MOL2CAP else ("valid" if c.valid else "no molecule")
        logp = "" if c.logp is None else f"{c.logp:.2f}"
        logp += "" if c.reverse_logp is None else f"<br>back {c.reverse_logp:.2f}"
        drawn = svg(c.smiles) if c.direction != MOL2CAP and c.smiles else ""
        cells = [str(c.rank), *[drawn] * drawn_outputs, cut(c.output), logp, said]
        rows.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(rows)
    return f'<div style="overflow-x:auto"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
