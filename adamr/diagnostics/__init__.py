"""Leaks and statistics of the moments, cheap enough to log every step.

All functions are pure and run under jit, vmap and scan, so they serve a logger and a
test alike. Results hold one number for the whole tree (`total`) and one per leaf in
leaf order (`per_leaf`). A ratio 0 / 0 is 0, any other number over 0 is inf, and NaN
stays NaN: a broken step never looks like a good one.
"""

from adamr.diagnostics.leak import effective_learning_rate as effective_learning_rate
from adamr.diagnostics.leak import update_leak as update_leak
from adamr.diagnostics.measured import Measured as Measured
from adamr.diagnostics.moments import MomentStatistics as MomentStatistics
from adamr.diagnostics.moments import moment_statistics as moment_statistics
