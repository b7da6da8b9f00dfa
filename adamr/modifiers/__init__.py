"""Modifiers g -> g̃: what a method for continual learning makes of the gradient.

A modifier knows nothing of moments. Put it in a route (`adamr.routing`), or before
any optimizer.
"""

from adamr.modifiers import dual as dual
from adamr.modifiers.constraint import ConstraintState as ConstraintState
from adamr.modifiers.constraint import agem_constraint as agem_constraint
from adamr.modifiers.constraint import gem_constraint as gem_constraint
from adamr.modifiers.mask import DisruptionState as DisruptionState
from adamr.modifiers.mask import disruption_mask as disruption_mask
from adamr.modifiers.natural import FopngState as FopngState
from adamr.modifiers.natural import average_fisher as average_fisher
from adamr.modifiers.natural import fopng as fopng
from adamr.modifiers.natural import set_fisher as set_fisher
from adamr.modifiers.penalty import Anchor as Anchor
from adamr.modifiers.penalty import PenaltyState as PenaltyState
from adamr.modifiers.penalty import quadratic_penalty as quadratic_penalty
from adamr.modifiers.projection import ProjectOutState as ProjectOutState
from adamr.modifiers.projection import project_out as project_out
from adamr.modifiers.replay import MixState as MixState
from adamr.modifiers.replay import dark_experience_loss as dark_experience_loss
from adamr.modifiers.replay import mix_gradients as mix_gradients
from adamr.modifiers.replay import replay_routing as replay_routing
from adamr.modifiers.surgery import PCGradState as PCGradState
from adamr.modifiers.surgery import cagrad as cagrad
from adamr.modifiers.surgery import pcgrad as pcgrad
