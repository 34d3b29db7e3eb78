"""Each room of lmolt/ imports only from those to its right: arrows point one way."""

import ast

import pytest
from conftest import ROOT

ROOMS = ["scripts", "demo", "report", "training", "generation", "models", "distributed", "merging", "data", "metrics"]
BESIDE = [
    "card",
    "hub",
    "recipes",
    "prompts",
    "ownership",
]  # what all rooms need
RANK = {room: i for i, room in enumerate(ROOMS)} | dict.fromkeys(BESIDE, len(ROOMS)) | {"files": len(ROOMS) + 1}


@pytest.mark.parametrize("room", RANK)
def test_a_room_imports_only_from_those_to_its_right(room):
    path = ROOT / "scripts" if room == "scripts" else ROOT / "lmolt" / room
    for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):  # lazy imports too
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are written out"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for wanted in {name.split(".")[1] for name in names if name.startswith("lmolt.")} & RANK.keys():
                assert wanted == room or RANK[wanted] >= RANK[room], f"{file} imports {wanted}"


def test_rooms_are_all_there_is():
    found = {
        path.stem for path in (ROOT / "lmolt").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found == RANK.keys() - {"scripts"} | {"__init__"} and len(found) <= 20
