"""Accuracy, forgetting and transfer of a stream of T tasks, from accuracies.

    after each task    R[i, j]      accuracy on task j after learning task i
    (T, T)                          average_accuracy, learning_accuracy,
                                    backward_transfer, forward_transfer, forgetting,
                                    intransigence
    during each task   A[i, h, j]   accuracy on task j at evaluation h of task i
    (T, H, T)                       min_accuracy, worst_case_accuracy,
                                    average_anytime_accuracy, windowed_forgetting,
                                    windowed_plasticity

Tasks are counted from 0 and every number is a plain mean, so fractions give fractions
and percentages give percentages; the stated ranges are for fractions. Every function
takes NumPy or JAX arrays and runs under `jax.jit`. Entries that a definition does not
read may be NaN, such as tasks that were not evaluated before they were learnt.

Papers use one name for different numbers; each docstring states the differences.
"""

from adamr.metrics.after_tasks import average_accuracy as average_accuracy
from adamr.metrics.after_tasks import backward_transfer as backward_transfer
from adamr.metrics.after_tasks import forgetting as forgetting
from adamr.metrics.after_tasks import forward_transfer as forward_transfer
from adamr.metrics.after_tasks import intransigence as intransigence
from adamr.metrics.after_tasks import learning_accuracy as learning_accuracy
from adamr.metrics.anytime import average_anytime_accuracy as average_anytime_accuracy
from adamr.metrics.anytime import min_accuracy as min_accuracy
from adamr.metrics.anytime import windowed_forgetting as windowed_forgetting
from adamr.metrics.anytime import windowed_plasticity as windowed_plasticity
from adamr.metrics.anytime import worst_case_accuracy as worst_case_accuracy
