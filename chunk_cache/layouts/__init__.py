"""What the tensors of a record hold, and how they get out of and into a paged pool: one file per layout."""
