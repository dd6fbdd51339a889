"""Hypothesis may take its time: how long an example takes depends on what else the machine does."""

from hypothesis import HealthCheck, settings

settings.register_profile("baton", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("baton")
