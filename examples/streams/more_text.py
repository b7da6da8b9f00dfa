"""Eight more domains that are installed with Python and the packages: sixteen in all.

They are found as installed.py finds its eight. Several are program text of
different kinds, so they have more in common than the first eight.
"""

import sysconfig
from pathlib import Path

from examples.streams.files import visible
from examples.streams.installed import Files, Source


def _under(*folders: str, suffixes: tuple[str, ...] = (".py",)):
    def belongs(name: str) -> bool:
        inside = name.startswith(folders) and "/tests/" not in name
        return inside and name.endswith(suffixes)

    return belongs


def _is_test(name: str) -> bool:
    return "/tests/" in name and name.endswith(".py")


def _is_cython(name: str) -> bool:
    return name.endswith((".pyx", ".pxd"))


def character_tables() -> Files:
    root = Path(sysconfig.get_path("stdlib")) / "encodings"
    return {f"encodings/{path.name}": path for path in visible(root.glob("*.py"), root)}


MORE_SOURCES = {
    "tests": Source("test modules of the packages", _is_test),
    "stubs": Source("type stubs", lambda name: name.endswith(".pyi")),
    "cython": Source("Cython modules", _is_cython),
    "character_tables": Source(
        "character encodings of the standard library",
        lambda name: False,
        more=character_tables,
    ),
    "lexers": Source("syntax definitions of Pygments", _under("pygments/lexers/")),
    "font_tools": Source("modules of fontTools", _under("fontTools/")),
    "checkpoints": Source("modules of Orbax", _under("orbax/")),
    "terminal": Source(
        "modules of Rich, Tyro and Pygments that print to a terminal",
        _under("rich/", "tyro/", "pygments/formatters/"),
    ),
}
