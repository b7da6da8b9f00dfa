"""Whole optimizers by the name of the paper; every recipe is at the top level.

The modules here also hold what belongs to a single recipe, such as
`recipes.ogd.ogd_directions`.
"""

from adamr.recipes import adam_nscl as adam_nscl
from adamr.recipes import adamr as adamr
from adamr.recipes import classp as classp
from adamr.recipes import er as er
from adamr.recipes import ewc as ewc
from adamr.recipes import gem as gem
from adamr.recipes import gpm as gpm
from adamr.recipes import masked as masked
from adamr.recipes import mofo as mofo
from adamr.recipes import muon as muon
from adamr.recipes import norms as norms
from adamr.recipes import ogd as ogd
from adamr.recipes import osft as osft
from adamr.recipes import trgp as trgp
