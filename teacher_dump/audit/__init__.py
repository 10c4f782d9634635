"""Score a sample of a cache again and compare."""
