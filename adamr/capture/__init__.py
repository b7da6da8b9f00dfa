"""Layer inputs and fan-in axes of any model, read off its computation."""

from adamr.capture.axes import contracted_axes as contracted_axes
from adamr.capture.covered import coverage as coverage
from adamr.capture.inputs import layer_inputs as layer_inputs
from adamr.capture.linen import capture_linen_inputs as capture_linen_inputs
from adamr.capture.linen import linen_kernel_axes as linen_kernel_axes
from adamr.capture.nnx import capture_inputs as capture_inputs
from adamr.capture.nnx import kernel_axes as kernel_axes
