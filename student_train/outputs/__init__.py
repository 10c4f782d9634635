"""All that a training writes."""
