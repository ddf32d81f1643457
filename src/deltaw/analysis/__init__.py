"""Looking into adapters: norms, dead layers, damage."""
