"""What tests share. Never collected."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
FIXTURES = ROOT / "tests" / "fixtures"
"""Caches of earlier versions of the format."""
