"""What an adapter does to W: one file per method."""
