"""Bytes at a place: complete or absent."""
