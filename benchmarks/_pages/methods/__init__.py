"""Writes docs/methods/, the pages of the methods, from code, tests and measurements.

python -m benchmarks._pages.methods              measures all, writes the pages
python -m benchmarks._pages.methods gpm ewc      measures these, writes the pages
python -m benchmarks._pages.methods none         writes the pages

families/    the methods: what each keeps, how to build it, its lines, its tests
setting      the names that their lines use
probes       a small model, and how far a step is from what its method promises
measure      state, operations, promises -> benchmarks/results/methods.json
verified     the tests that a method names, and which of them pass
docstrings   equations and papers
writing      all of it -> Markdown
"""
