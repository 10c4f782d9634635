"""The format: scored sequences to shards and back."""
