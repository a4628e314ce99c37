"""Training: one loop, three stages (autoencoder, backbone, generator), each described by a recipe."""
