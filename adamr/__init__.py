"""Gradient modification and adaptive optimizers that compose, for continual learning.

Names are grouped by what one does; what is not here is in its room:

    routing       which gradient each moment sees     `routing.carrier` is the map
    modifiers     g -> g̃: projections, penalties, constraints, replay, masks
    protection    links whose step keeps its promise exactly
    subspaces     what is protected, and how it grows
    capture       the inputs of a model's layers
    penalties     importance of parameters, and the anchor they are pulled to
    trust         learning inside the protected space
    lora          low-rank adapters of pretrained models
    recipes       whole optimizers by the name of the paper
    metrics       forgetting, transfer and the like
    checkpoint    exact resume after a kill
    state, diagnostics, sharding, schedules, buffers, plateau, averaging
"""

from adamr import averaging as averaging
from adamr import buffers as buffers
from adamr import capture as capture
from adamr import checkpoint as checkpoint
from adamr import diagnostics as diagnostics
from adamr import lora as lora
from adamr import metrics as metrics
from adamr import modifiers as modifiers
from adamr import penalties as penalties
from adamr import plateau as plateau
from adamr import protection as protection
from adamr import recipes as recipes
from adamr import routing as routing
from adamr import schedules as schedules
from adamr import sharding as sharding
from adamr import state as state
from adamr import subspaces as subspaces
from adamr import trust as trust

# Layer inputs, read off the computation.
from adamr.capture import contracted_axes as contracted_axes
from adamr.capture import coverage as coverage
from adamr.capture import layer_inputs as layer_inputs

# Measure.
from adamr.diagnostics import moment_statistics as moment_statistics
from adamr.diagnostics import update_leak as update_leak

# Modifiers: g -> g̃.
from adamr.modifiers import agem_constraint as agem_constraint
from adamr.modifiers import cagrad as cagrad
from adamr.modifiers import fopng as fopng
from adamr.modifiers import gem_constraint as gem_constraint
from adamr.modifiers import pcgrad as pcgrad
from adamr.modifiers import project_out as project_out
from adamr.modifiers import quadratic_penalty as quadratic_penalty

# Importance and anchors of penalties, set at the end of a task.
from adamr.penalties import consolidate as consolidate
from adamr.penalties import consolidate_rwalk as consolidate_rwalk
from adamr.penalties import consolidate_si as consolidate_si
from adamr.penalties import fisher_information as fisher_information
from adamr.penalties import get_anchor as get_anchor
from adamr.penalties import set_anchor as set_anchor

# Links whose step is exact.
from adamr.protection import constrained_second_moment as constrained_second_moment
from adamr.protection import freeze_masked as freeze_masked
from adamr.protection import in_eigenbasis as in_eigenbasis
from adamr.protection import oblique_second_moment as oblique_second_moment
from adamr.protection import protect_update as protect_update
from adamr.protection import proximal_second_moment as proximal_second_moment
from adamr.protection import redraw_half as redraw_half
from adamr.protection import two_sided as two_sided

# Recipes.
from adamr.recipes.adam_nscl import adam_nscl as adam_nscl
from adamr.recipes.adamr import adamr as adamr
from adamr.recipes.classp import classp as classp
from adamr.recipes.er import er as er
from adamr.recipes.ewc import ewc as ewc
from adamr.recipes.ewc import l2_sp as l2_sp
from adamr.recipes.ewc import mas as mas
from adamr.recipes.ewc import online_ewc as online_ewc
from adamr.recipes.ewc import rwalk as rwalk
from adamr.recipes.ewc import si as si
from adamr.recipes.gem import agem as agem
from adamr.recipes.gem import d_mgem as d_mgem
from adamr.recipes.gem import gem as gem
from adamr.recipes.gem import p_mgem as p_mgem
from adamr.recipes.gpm import gpm as gpm
from adamr.recipes.gpm import gpm_si as gpm_si
from adamr.recipes.gpm import sgp as sgp
from adamr.recipes.masked import hft as hft
from adamr.recipes.masked import mudman as mudman
from adamr.recipes.mofo import mofo as mofo
from adamr.recipes.muon import muon as muon
from adamr.recipes.norms import adamp as adamp
from adamr.recipes.ogd import ogd as ogd
from adamr.recipes.osft import osft as osft
from adamr.recipes.trgp import rogo as rogo
from adamr.recipes.trgp import trgp as trgp

# Routes, strengths and the merging link.
from adamr.routing import Routed as Routed
from adamr.routing import constant_scale as constant_scale
from adamr.routing import faithful_second_moment as faithful_second_moment
from adamr.routing import overlap_adaptive_scale as overlap_adaptive_scale
from adamr.routing import route_both_moments as route_both_moments
from adamr.routing import route_first_moment as route_first_moment
from adamr.routing import route_second_moment as route_second_moment

# Place on devices.
from adamr.sharding import state_shardings as state_shardings

# Task boundaries.
from adamr.state import get_subspace as get_subspace
from adamr.state import protect_inputs as protect_inputs
from adamr.state import reset_moments as reset_moments
from adamr.state import reset_overlap as reset_overlap
from adamr.state import set_subspace as set_subspace

# Subspaces and directions.
from adamr.subspaces import Axes as Axes
from adamr.subspaces import Directions as Directions
from adamr.subspaces import Subspace as Subspace
from adamr.subspaces import default_axes as default_axes
from adamr.subspaces import empty_directions as empty_directions
from adamr.subspaces import empty_subspace as empty_subspace
from adamr.subspaces import grow_directions as grow_directions
from adamr.subspaces import grow_subspace as grow_subspace
from adamr.subspaces import make_subspace as make_subspace
from adamr.subspaces import weight_subspaces as weight_subspaces

__version__ = "0.1.0"  # the only place that says it
