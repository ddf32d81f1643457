"""How much memory a recipe's run will take, said before any weight is read."""
