"""Records to token sequences. Knows no teacher."""
