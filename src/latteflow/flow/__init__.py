"""Pure flow matching: no networks, no configuration, only numbers and tensors.

One convention everywhere: t = 0 is noise, t = 1 is data, and a velocity points from noise to data. ``schedulers`` is
the only module that knows another convention (diffusers').

- ``path``: the straight path between noise and data, and its velocity.
- ``intervals``: which group of layers is the expert of a time t; the one routing function.
- ``timesteps``: draws the training times and shares a batch out among the groups.
- ``objective``: the layerwise flow-matching loss.
- ``guidance``: classifier-free guidance.
- ``schedulers``: diffusers' solvers, driven in our convention.

Nothing is re-exported here, so that importing ``intervals`` does not import diffusers.
"""
