"""The HTTP API: what OpenAI's clients speak, in front of an engine."""
