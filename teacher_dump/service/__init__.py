"""A teacher for other machines."""
