"""How engines and servers of this process are started: fork server, preloading, faults of children."""
