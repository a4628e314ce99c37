"""The networks: the replica and its experts, the frozen backbones' context, the autoencoder, the embedded models."""
