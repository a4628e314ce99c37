"""The server past one machine: replicas on Ray Serve, and pictures by the list on Ray Data."""
