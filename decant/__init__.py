"""Decant under one name."""
