"""The student and its loss."""
