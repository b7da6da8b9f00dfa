"""Continual fine-tuning of pretrained language models.

smollm2.py      the default model: fetched, checked, converted, cached
conversion.py   GGUF -> Hugging Face files
families.py     config.json -> sizes of Tunix's models
folders.py      config.json, and what the weights' headers must have
placement.py    where model, pairs, rows and state lie on a mesh
rotary.py       rotary positions as config.json asks for them
models.py       folders of Hugging Face files -> functions of trees, with LoRA
generate.py     greedy answers to batches of prompts
tiny.py         a random model of the same code path
tasks.py        tasks of prompts and answers, from a folder or from installed text
formats.py      the layouts of folders and files
tokens.py       rows -> arrays of token ids, with the answer marked; batches
scores.py       a metric per task, of generated answers
sari.py         the metric of simplifications
measures.py     numbers of a stream: losses, transfer, distance to the base, memory
options.py      what the command line asks
plans.py        options -> model, tasks as arrays, optimizer
data.py         the tasks as arrays
learner.py      what is trained and what is frozen; layer inputs
methods.py      the methods by name
task_ends.py    what they do between two tasks
stream.py       the loop over tasks and steps
runs.py         the loop with checkpoints; the choice of a learning rate
dry_run.py      the programs compiled for a mesh, and the bytes of each device
answers.py      generated answers, scored
report.py       numbers of a run, the table
pictures.py     pictures of them
"""
