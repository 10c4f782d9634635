"""Score the sequences of a cache again."""
