"""What is done with a finished run: conversation, scores."""
