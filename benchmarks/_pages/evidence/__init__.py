"""docs/evidence/: its pages, the table of all cells, the guide's headlines.

python -m benchmarks._pages.evidence

text/         the prose, a file a page; `{{ … }}` is a number or a table of results
results.py    the committed results, by name
facts.py      numbers for the prose
tables.py     tables for the pages
cells.py      every cell as CSV and as a page that sorts and filters
pages.py      all of it put together
"""
