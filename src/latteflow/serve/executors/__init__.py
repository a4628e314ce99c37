"""Where the steps of pictures are made: one process for each expert group, and when that is worth it."""
