"""Writers of the pages: docs/methods/, docs/evidence/, the report of a run."""
