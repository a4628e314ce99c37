"""The engine: requests advance one step at a time, and share a forward where they share an expert. No HTTP in it."""
