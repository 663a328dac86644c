"""Generated tests are not timed: on a busy machine the usual 200 ms an example say nothing about the code."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
