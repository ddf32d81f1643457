"""Files of other trainers read as recipes: one file per tool, and what becomes of each key."""
