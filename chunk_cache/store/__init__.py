"""The memory tier: records under a byte budget, leases on them, and the right to build missing ones."""
