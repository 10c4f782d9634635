"""The dump, start to end."""
