"""The names of the routing policies. cluster/router/load_balancing/policy.py implements them; configuration and options refer to them."""

from typing import Literal, get_args

RoutingPolicy = Literal["prefix", "least_load", "round_robin"]
ROUTING_POLICIES: tuple[RoutingPolicy, ...] = get_args(RoutingPolicy)
