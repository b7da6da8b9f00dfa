"""Links whose step keeps its promise exactly, whatever the second moment does."""

from adamr.protection.constrained import ConstrainedState as ConstrainedState
from adamr.protection.constrained import (
    constrained_second_moment as constrained_second_moment,
)
from adamr.protection.eigenbasis import EigenbasisState as EigenbasisState
from adamr.protection.eigenbasis import Rotated as Rotated
from adamr.protection.eigenbasis import in_eigenbasis as in_eigenbasis
from adamr.protection.frozen import FreezeMaskedState as FreezeMaskedState
from adamr.protection.frozen import freeze_masked as freeze_masked
from adamr.protection.half import HalfFineTuningState as HalfFineTuningState
from adamr.protection.half import default_groups as default_groups
from adamr.protection.half import half_fine_tuning as half_fine_tuning
from adamr.protection.half import redraw_half as redraw_half
from adamr.protection.oblique import ObliqueState as ObliqueState
from adamr.protection.oblique import oblique_second_moment as oblique_second_moment
from adamr.protection.proximal import ProximalMomentState as ProximalMomentState
from adamr.protection.proximal import ProximalPenaltyState as ProximalPenaltyState
from adamr.protection.proximal import proximal_penalty as proximal_penalty
from adamr.protection.proximal import proximal_second_moment as proximal_second_moment
from adamr.protection.update import ProtectUpdateState as ProtectUpdateState
from adamr.protection.update import protect_update as protect_update
from adamr.protection.update import two_sided as two_sided
