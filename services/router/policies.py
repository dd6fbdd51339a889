"""The policies by the names that configuration knows them by."""

from services.router.policy import Policy, least_load, prefix_aware, round_robin
from services.router.predicted import predicted

POLICIES: dict[str, Policy] = {
    "predicted": predicted,
    "prefix_aware": prefix_aware,
    "least_load": least_load,
    "round_robin": round_robin,
}
