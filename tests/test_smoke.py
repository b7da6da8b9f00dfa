"""`python -m pytest -m smoke` reaches every room."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
OTHERS = ["benchmarks", "contract", "docs", "examples", "parity"]
ROOMS = sorted(
    path.stem
    for path in (HERE.parent / "adamr").iterdir()
    if not path.name.startswith("_") and path.suffix in ("", ".py")
)


@pytest.mark.smoke
@pytest.mark.parametrize("room", [*ROOMS, *OTHERS])
def test_every_room_has_a_smoke_test(room):
    places = (f"{room}/test_*.py", f"test_{room}.py", f"contract/test_{room}.py")
    tests = "".join(file.read_text() for at in places for file in HERE.glob(at))
    assert "pytest.mark.smoke" in tests
