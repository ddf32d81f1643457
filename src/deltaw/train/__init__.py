"""Fine-tuning from a table of examples: data, recipes, runs and their evaluation."""
