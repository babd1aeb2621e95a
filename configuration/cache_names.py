"""What a call and its output name their cache: `cache` since transformers 5.24, `past_key_values` before."""

CACHE_NAMES = ("cache", "past_key_values")
