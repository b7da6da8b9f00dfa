"""Streams of tasks for continual learning, as plain arrays.

  stream = load("permuted-digits", seed=0)
  print(describe(stream))
  for t in range(len(stream.task_names)):
      learn(task(stream, t).train, output_mask(stream, t, t))

  stream.py     what a stream is: scenario, tasks, masks, parts of one shape
  registry.py   load(name, ...) and names()
  images.py     permuted, rotated, split, one data set a domain   (pixels.py)
  text.py       8 or 16 domains of text with an overlap knob
  domains.py    a domain of text, folders of them, windows; `DataError`
  installed.py  text that is installed with Python and the packages   (more_text.py)
  synthetic.py  Markov chains whose entropy and overlap are known
  sources.py    finds a data set and its reader: readers.py, cifar.py, folders.py,
                tfds.py, hub.py

`python -m examples.streams` lists the names; with a name it describes the stream.
"""

from examples.streams.domains import DataError as DataError
from examples.streams.registry import load as load
from examples.streams.registry import names as names
from examples.streams.stream import SCENARIOS as SCENARIOS
from examples.streams.stream import Part as Part
from examples.streams.stream import Stream as Stream
from examples.streams.stream import Task as Task
from examples.streams.stream import batch_indices as batch_indices
from examples.streams.stream import describe as describe
from examples.streams.stream import for_tuning as for_tuning
from examples.streams.stream import output_mask as output_mask
from examples.streams.stream import task as task
