"""Task boundaries of the penalties: importance and the anchor."""

from adamr.penalties.anchor import consolidate as consolidate
from adamr.penalties.anchor import get_anchor as get_anchor
from adamr.penalties.anchor import set_anchor as set_anchor
from adamr.penalties.importance import fisher_information as fisher_information
from adamr.penalties.importance import (
    memory_aware_importance as memory_aware_importance,
)
from adamr.penalties.rwalk import RWalkState as RWalkState
from adamr.penalties.rwalk import consolidate_rwalk as consolidate_rwalk
from adamr.penalties.rwalk import track_rwalk as track_rwalk
from adamr.penalties.si import SIState as SIState
from adamr.penalties.si import consolidate_si as consolidate_si
from adamr.penalties.si import track_si as track_si
