"""One forward pass over fewer rows: probing passes, the final pass, and ordinary prefill where it fails."""
