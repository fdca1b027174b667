"""Evaluation of conversation memories: what each method keeps of the evidence, how it answers, and what it costs."""
