"""Settings of what connects the stages: recipes, and the split of data by prompt."""
