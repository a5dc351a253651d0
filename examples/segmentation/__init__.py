"""Which pixel belongs to what: an encoder-decoder on scenes that are drawn as they are read."""
