"""A load generator for a server of Ollama's API: what it sends, how it sends it, what came of it."""
