"""What trains on language data: supervised, and by preferences."""
