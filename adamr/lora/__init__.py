"""Low-rank adapters (LoRA): pairs A, B beside frozen kernels, protected exactly."""

from adamr.lora.pairs import Pair as Pair
from adamr.lora.pairs import find_pairs as find_pairs
from adamr.lora.precision import cast_like as cast_like
from adamr.lora.precision import masters as masters
from adamr.lora.task import Room as Room
from adamr.lora.task import axes as axes
from adamr.lora.task import room as room
from adamr.lora.task import start_task as start_task
