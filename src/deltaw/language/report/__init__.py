"""What is said of data and plans without training: `deltaw data`, `deltaw check`."""
