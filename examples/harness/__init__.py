"""What the examples have in common: a loop over tasks, and what it is given and yields.

    problem.py      a model and its tasks as plain functions and arrays
    methods.py      every recipe: optimizer, evidence of a step, task end
    task_ends.py    what happens between two tasks
    replay.py       examples of finished tasks, and gradients of the loss on them
    setting.py      what optimizers are built from, and the defaults of a run
    loop.py         one task after the other, compiled once (parallel.py, evaluate.py)
    resume.py       the loop with checkpoints; tuning and references
    example.py      what an example hands over, and what it gets back
    cli.py          the command line (progress.py, loggers.py)
    statistics.py   metrics, intervals, paired tests
    meshes.py       the devices of `--mesh`, and batches on them
    report.py       `results.json` and the table
    pictures.py     accuracies as pictures

Nothing here imports an example.
"""
