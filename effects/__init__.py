"""What dropping history does to the action, and how far attention foretells it."""
