"""Gradient modification and adaptive optimizers that compose. Start at `routing`."""

from importlib.metadata import PackageNotFoundError, version

from adamr import capture as capture
from adamr import checkpoint as checkpoint
from adamr import diagnostics as diagnostics
from adamr import metrics as metrics
from adamr.axes import Axes as Axes
from adamr.axes import default_axes as default_axes
from adamr.bases import empty_subspace as empty_subspace
from adamr.bases import make_subspace as make_subspace
from adamr.classp import classp as classp
from adamr.consolidation import consolidate as consolidate
from adamr.consolidation import consolidate_path as consolidate_path
from adamr.consolidation import consolidate_walk as consolidate_walk
from adamr.consolidation import get_anchor as get_anchor
from adamr.consolidation import set_anchor as set_anchor
from adamr.covariance import Covariance as Covariance
from adamr.covariance import empty_covariance as empty_covariance
from adamr.covariance import null_space_complement as null_space_complement
from adamr.covariance import update_covariance as update_covariance
from adamr.diagnostics import effective_learning_rate as effective_learning_rate
from adamr.diagnostics import moment_statistics as moment_statistics
from adamr.diagnostics import update_leak as update_leak
from adamr.directions import Directions as Directions
from adamr.directions import empty_directions as empty_directions
from adamr.gram_schmidt import grow_directions as grow_directions
from adamr.gram_schmidt import principal_directions as principal_directions
from adamr.growth import gradient_samples as gradient_samples
from adamr.growth import grow_subspace as grow_subspace
from adamr.growth import merge_subspaces as merge_subspaces
from adamr.growth import truncate_subspace as truncate_subspace
from adamr.importance import fisher_information as fisher_information
from adamr.importance import memory_aware_importance as memory_aware_importance
from adamr.logits import logit_gradients as logit_gradients
from adamr.modifiers.constraint import agem_constraint as agem_constraint
from adamr.modifiers.constraint import gem_constraint as gem_constraint
from adamr.modifiers.half import default_groups as default_groups
from adamr.modifiers.half import half_fine_tuning as half_fine_tuning
from adamr.modifiers.half import redraw_half as redraw_half
from adamr.modifiers.mask import disruption_mask as disruption_mask
from adamr.modifiers.mask import freeze_masked as freeze_masked
from adamr.modifiers.metric import (
    constrained_second_moment as constrained_second_moment,
)
from adamr.modifiers.natural import average_fisher as average_fisher
from adamr.modifiers.natural import fopng as fopng
from adamr.modifiers.penalty import Anchor as Anchor
from adamr.modifiers.penalty import quadratic_penalty as quadratic_penalty
from adamr.modifiers.projection import project_out as project_out
from adamr.modifiers.proximal import proximal_penalty as proximal_penalty
from adamr.modifiers.proximal import proximal_second_moment as proximal_second_moment
from adamr.modifiers.replay import dark_experience_loss as dark_experience_loss
from adamr.modifiers.replay import mix_gradients as mix_gradients
from adamr.modifiers.replay import replay_routing as replay_routing
from adamr.modifiers.surgery import cagrad as cagrad
from adamr.modifiers.surgery import pcgrad as pcgrad
from adamr.offloading import offload as offload
from adamr.offloading import onload as onload
from adamr.optimizers import adamr as adamr
from adamr.path_integral import track_path as track_path
from adamr.path_integral import track_walk as track_walk
from adamr.protection import in_eigenbasis as in_eigenbasis
from adamr.protection import oblique_second_moment as oblique_second_moment
from adamr.protection import protect_update as protect_update
from adamr.protection import two_sided as two_sided
from adamr.recipes.constraint import agem as agem
from adamr.recipes.constraint import d_mgem as d_mgem
from adamr.recipes.constraint import gem as gem
from adamr.recipes.constraint import p_mgem as p_mgem
from adamr.recipes.gpm import adam_nscl as adam_nscl
from adamr.recipes.gpm import gpm as gpm
from adamr.recipes.gpm import sgp as sgp
from adamr.recipes.mask import hft as hft
from adamr.recipes.mask import mudman as mudman
from adamr.recipes.ogd import ogd as ogd
from adamr.recipes.ogd import ogd_directions as ogd_directions
from adamr.recipes.ogd import ogd_plus_directions as ogd_plus_directions
from adamr.recipes.ogd import pca_ogd_directions as pca_ogd_directions
from adamr.recipes.penalty import ewc as ewc
from adamr.recipes.penalty import l2_sp as l2_sp
from adamr.recipes.penalty import mas as mas
from adamr.recipes.penalty import online_ewc as online_ewc
from adamr.recipes.penalty import rwalk as rwalk
from adamr.recipes.penalty import si as si
from adamr.recipes.replay import er as er
from adamr.recipes.trgp import rogo as rogo
from adamr.recipes.trgp import trgp as trgp
from adamr.relaxation import relaxing_subspace as relaxing_subspace
from adamr.routing import Routed as Routed
from adamr.routing import faithful_second_moment as faithful_second_moment
from adamr.routing import route_both_moments as route_both_moments
from adamr.routing import route_first_moment as route_first_moment
from adamr.routing import route_second_moment as route_second_moment
from adamr.scales import fold_scales as fold_scales
from adamr.scales import init_scales as init_scales
from adamr.scales import scale_penalty as scale_penalty
from adamr.scales import scaled_params as scaled_params
from adamr.scales import scaled_weight as scaled_weight
from adamr.shapes import adamp as adamp
from adamr.shapes import normalize_and_project as normalize_and_project
from adamr.shapes import remove_radial as remove_radial
from adamr.sharding import state_shardings as state_shardings
from adamr.sketch import Sketch as Sketch
from adamr.sketch import empty_sketch as empty_sketch
from adamr.sketch import update_sketch as update_sketch
from adamr.state import get_subspace as get_subspace
from adamr.state import project_moments as project_moments
from adamr.state import read_diagnostics as read_diagnostics
from adamr.state import reset_moments as reset_moments
from adamr.state import reset_overlap as reset_overlap
from adamr.state import set_fisher as set_fisher
from adamr.state import set_subspace as set_subspace
from adamr.strength import constant_scale as constant_scale
from adamr.strength import overlap_adaptive_scale as overlap_adaptive_scale
from adamr.subspace import Subspace as Subspace
from adamr.subspace import project as project
from adamr.subspace import rank as rank
from adamr.trust_region import TrustRegion as TrustRegion
from adamr.trust_region import grow_task_subspace as grow_task_subspace
from adamr.trust_region import trust_region as trust_region

try:
    __version__ = version("adamr")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0.0.0"
