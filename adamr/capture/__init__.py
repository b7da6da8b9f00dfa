"""Layer inputs and fan-in axes of any model, read off its computation."""

from adamr.capture.axes import contracted_axes as contracted_axes
from adamr.capture.covered import coverage as coverage
from adamr.capture.inputs import layer_inputs as layer_inputs
from adamr.subspaces.axes import unread_leaves as unread_leaves
