"""Serving: an engine that advances requests step by step, HTTP in front of it, a page, and scale-out."""
