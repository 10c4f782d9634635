"""Caches as dataset repositories of the Hugging Face hub: push, pull, and the card."""
