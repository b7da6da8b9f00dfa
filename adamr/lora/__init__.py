"""Low-rank adapters (LoRA): pairs A, B beside frozen kernels, protected exactly."""

from adamr.lora.blocks import BlockState as BlockState
from adamr.lora.blocks import in_blocks as in_blocks
from adamr.lora.blocks import orthogonality as orthogonality
from adamr.lora.blocks import start_block as start_block
from adamr.lora.blocks import train_block as train_block
from adamr.lora.fixed import hold as hold
from adamr.lora.fixed import train_b as train_b
from adamr.lora.pairs import Pair as Pair
from adamr.lora.pairs import find_pairs as find_pairs
from adamr.lora.precision import cast_like as cast_like
from adamr.lora.precision import masters as masters
from adamr.lora.remaining import Room as Room
from adamr.lora.remaining import room as room
from adamr.lora.starts import inflora as inflora
from adamr.lora.starts import keeplora as keeplora
from adamr.lora.task import axes as axes
from adamr.lora.task import start_task as start_task
