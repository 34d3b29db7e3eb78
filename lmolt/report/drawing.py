"""Molecules as pictures, drawn in workers: RDKit's limits hold here too (lmolt/metrics/workers.py)."""

from functools import lru_cache

from rdkit import Chem
from rdkit.Chem import rdDepictor, rdFMCS
from rdkit.Chem.Draw import rdMolDraw2D

from lmolt.metrics.smiles import parse
from lmolt.metrics.workers import in_processes

CELL = (620, 440)  # pixels of a drawn molecule, three times what a page shows
_LONGEST = 2000  # characters: more is no picture


@lru_cache(maxsize=4096)
def draw(smiles: str, reference: str | None = None, size: tuple[int, int] = CELL) -> bytes | None:
    """PNG of a molecule, atoms outside the largest part shared with `reference` marked; None where `smiles` is none,
    or is too large to be drawn."""
    found = in_processes(_draw, [(smiles, reference or "", size)], 1)[0]
    return found if isinstance(found, bytes) else None


def _draw(job: tuple[str, str, tuple[int, int]]) -> bytes | None:
    smiles, reference, size = job
    molecule = parse(smiles) if len(smiles) <= _LONGEST else None
    if molecule is None:
        return None
    large, marked = size[0] > 300, []
    rdDepictor.SetPreferCoordGen(large)  # the better layout, in ten times the time
    rdDepictor.Compute2DCoords(molecule)
    target = parse(reference)
    if target is not None:
        marked = _lay_over(molecule, target)
    canvas = rdMolDraw2D.MolDraw2DCairo(*size)
    options = canvas.drawOptions()
    options.setHighlightColour((0.96, 0.72, 0.50))
    options.padding = 0.06
    options.bondLineWidth = 2.5 if large else 1
    options.minFontSize = 10 if large else 6
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, molecule, highlightAtoms=marked)
    canvas.FinishDrawing()
    return canvas.GetDrawingText()


def _lay_over(molecule: Chem.Mol, target: Chem.Mol) -> list[int]:
    """Turn `molecule` so that the largest part shared with `target` lies as there; the atoms outside that part."""
    rdDepictor.Compute2DCoords(target)
    found = rdFMCS.FindMCS([target, molecule], timeout=1, ringMatchesRingOnly=True, completeRingsOnly=True)
    if found.numAtoms < 3:
        return list(range(molecule.GetNumAtoms()))
    shared = Chem.MolFromSmarts(found.smartsString)
    rdDepictor.GenerateDepictionMatching2DStructure(molecule, target, refPatt=shared, acceptFailure=True)
    return sorted(set(range(molecule.GetNumAtoms())) - set(molecule.GetSubstructMatch(shared)))
