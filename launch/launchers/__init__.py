"""Ways to start ranks: one file each, none of which knows another. Each runs a `Plan` and gives an exit code."""
