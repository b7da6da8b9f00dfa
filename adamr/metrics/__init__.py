"""Accuracy, forgetting and transfer of a stream of tasks."""

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
