"""CacheBlend (arXiv 2405.16444): the positions whose V deviates most at an early layer.

The paper recomputes 10 to 20% of the reused positions. It keeps a little more at the early layers
and narrows the set from layer to layer; here one choice at layer 1 serves all layers.
"""

from kvshare_mm.apps.bench.methods.base import Method

CACHEBLEND = Method(
    "cacheblend",
    "CacheBlend (2405.16444): top 15% V deviation",
    "on",
    "deviation:0.15",
    tuple(f"deviation:{share}" for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)),
)
