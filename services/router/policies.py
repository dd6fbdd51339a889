"""The policies by the names that configuration knows them by."""

from baton.config import PolicyName
from services.router.peers import at_random, cache_aware, dynamo, llm_d, mooncake
from services.router.policy import Policy, least_load, prefix_aware, round_robin
from services.router.predicted import predicted

POLICIES: dict[PolicyName, Policy] = {
    "predicted": predicted,
    "prefix_aware": prefix_aware,
    "least_load": least_load,
    "round_robin": round_robin,
    "random": at_random,
    "cache_aware": cache_aware,
    "dynamo": dynamo,
    "llm_d": llm_d,
    "mooncake": mooncake,
}
