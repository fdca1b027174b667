"""What fusion knows of one request, and what the client is told of it."""
