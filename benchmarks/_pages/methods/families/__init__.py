"""The methods by family; a family is a page of docs/methods/, a method a section."""

from benchmarks._pages.methods.families.constraints import CONSTRAINTS
from benchmarks._pages.methods.families.directions import DIRECTIONS
from benchmarks._pages.methods.families.masks import MASKS
from benchmarks._pages.methods.families.norms import NORMS
from benchmarks._pages.methods.families.penalties import PENALTIES
from benchmarks._pages.methods.families.pretrained import PRETRAINED
from benchmarks._pages.methods.families.projections import PROJECTIONS
from benchmarks._pages.methods.families.replay import REPLAY
from benchmarks._pages.methods.method import Family, Method

__all__ = ["FAMILIES", "METHODS"]

# By the name of the page.
FAMILIES: dict[str, Family] = {
    "projections": PROJECTIONS,
    "directions": DIRECTIONS,
    "constraints": CONSTRAINTS,
    "penalties": PENALTIES,
    "replay": REPLAY,
    "masks": MASKS,
    "pretrained": PRETRAINED,
    "norms": NORMS,
}
METHODS: dict[str, Method] = {
    name: method
    for family in FAMILIES.values()
    for name, method in family.methods.items()
}
