"""Methods compared on one task: rates searched alike, several seeds, and what the scores prove."""
