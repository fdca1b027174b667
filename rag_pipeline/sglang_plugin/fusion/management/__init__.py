"""What an operator asks of the chunk cache of a running engine, and orders: counts, listings, pins, evictions, checks."""
