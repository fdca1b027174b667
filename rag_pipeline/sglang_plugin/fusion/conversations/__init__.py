"""What one turn of a conversation leaves for the next."""
