"""Places below memory that hold records: what one has to offer, and one folder per place."""
