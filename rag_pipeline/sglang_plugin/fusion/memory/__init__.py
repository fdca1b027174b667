"""A conversation's memory of fixed size: records that prompts load, and that prefills leave by a retention rule."""
