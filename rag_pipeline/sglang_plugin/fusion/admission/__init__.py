"""What a request may load, store and publish, decided when the scheduler considers it."""
