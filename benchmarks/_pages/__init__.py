"""Writers of the pages: docs/methods.md, docs/evidence/, the report of a run."""
