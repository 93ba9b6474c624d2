"""Settings of the whole suite."""

from hypothesis import settings

# A loaded machine is slow, not wrong.
settings.register_profile("lavish_fast", deadline=None)
settings.load_profile("lavish_fast")
