"""A byte-level transformer on a stream of real text domains: the main job.

__main__.py   the command line
model.py      the transformer and its sizes
methods.py    names -> optimizers, with the learning rates a sweep chose
problem.py    text and transformer, as the shared loop takes them
report.py     definitions, rows of results.json, table
pictures.py   the PNG files

The text is in examples/streams: domains.py and installed.py.
"""
