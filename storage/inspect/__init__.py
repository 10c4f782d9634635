"""What is in a cache, and how good it is."""
