"""A longer search: `pytest tests/model --hypothesis-profile long`."""

from hypothesis import settings

settings.register_profile("long", max_examples=5000, stateful_step_count=100)
