"""A byte-level transformer on a stream of real text domains: the main job.

__main__.py   the command line
installed.py  default text: eight domains found in what is installed
data.py       a domain, folders of text, sampling of windows
model.py      the transformer and its sizes
methods.py    names -> optimizers, with the learning rates a sweep chose
problem.py    text and transformer, as the shared loop takes them
report.py     definitions, rows of results.json, table
pictures.py   the PNG files
"""
