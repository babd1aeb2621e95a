"""The names of a cache, newest first. What is done about them is in modeling/inputs/cache_argument.py."""

CACHE_NAMES = ("cache", "past_key_values")
