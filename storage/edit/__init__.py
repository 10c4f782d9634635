"""New caches from the rows of others: parts of one, several in one, each sequence once."""
