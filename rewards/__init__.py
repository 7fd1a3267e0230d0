"""Rewards that need a model or a world, one file a family; `reward.MODULES` says which is where."""
