"""Layer inputs of Flax models, and the axes along which kernels meet them."""

from adamr.capture.linen import capture_linen_inputs as capture_linen_inputs
from adamr.capture.linen import linen_kernel_axes as linen_kernel_axes
from adamr.capture.nnx import capture_inputs as capture_inputs
from adamr.capture.nnx import kernel_axes as kernel_axes
