"""Models, datasets and steps that the shipped configs refer to; plain torch, nothing of ddpkit."""
