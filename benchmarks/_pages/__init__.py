"""Writers of the pages: docs/methods.md, docs/evidence.md, the report of a run."""
