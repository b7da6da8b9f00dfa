"""Learning inside the protected space: trusted tasks (TRGP) and relaxation (ROGO)."""

from adamr.trust.region import TrustRegion as TrustRegion
from adamr.trust.region import grow_task_subspace as grow_task_subspace
from adamr.trust.region import trust_region as trust_region
from adamr.trust.relaxing import relaxing_subspace as relaxing_subspace
from adamr.trust.scaled_weights import fold_scales as fold_scales
from adamr.trust.scaled_weights import init_scales as init_scales
from adamr.trust.scaled_weights import scale_penalty as scale_penalty
from adamr.trust.scaled_weights import scaled_params as scaled_params
from adamr.trust.scaled_weights import scaled_weight as scaled_weight
