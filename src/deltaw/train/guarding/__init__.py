"""Training that notices when its loss leaves its course, and goes back."""
