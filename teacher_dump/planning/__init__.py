"""What a dump would cost, and what it would keep."""
