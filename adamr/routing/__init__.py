"""Which gradient each moment sees: routes, strengths and the merging link.

Start with `carrier`, whose docstring is the map of the library.
"""

from adamr.routing.carrier import Routed as Routed
from adamr.routing.carrier import RouteState as RouteState
from adamr.routing.carrier import route_both_moments as route_both_moments
from adamr.routing.carrier import route_first_moment as route_first_moment
from adamr.routing.carrier import route_second_moment as route_second_moment
from adamr.routing.carrier import route_with_strength as route_with_strength
from adamr.routing.merge import FaithfulSecondMomentState as FaithfulSecondMomentState
from adamr.routing.merge import faithful_second_moment as faithful_second_moment
from adamr.routing.strength import OverlapState as OverlapState
from adamr.routing.strength import StrengthState as StrengthState
from adamr.routing.strength import constant_scale as constant_scale
from adamr.routing.strength import overlap_adaptive_scale as overlap_adaptive_scale
