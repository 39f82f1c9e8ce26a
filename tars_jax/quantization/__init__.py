"""A tensor type for every matrix of a model, so that its file stays below a limit and what it says changes least."""
