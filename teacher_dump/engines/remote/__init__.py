"""What engines share whose teacher is behind HTTP: endpoints, retries, keys."""
