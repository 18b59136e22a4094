"""Property tests of the pure definitions: many small examples, no deadline on a shared machine."""

from hypothesis import HealthCheck, settings

# The fixture that clears WEFT_* variables runs once per test; that is right for properties too.
settings.register_profile(
    "weft", deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("weft")
