"""Storage backends of SGLang's hierarchical cache as a remote tier of chunk KV, each by its name."""
