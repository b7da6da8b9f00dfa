"""Exact resume: a run that is killed and started again ends in the same bits."""

from adamr.checkpoint.checkpoints import Checkpoints as Checkpoints
from adamr.checkpoint.checkpoints import Restored as Restored
from adamr.checkpoint.checkpoints import load as load
