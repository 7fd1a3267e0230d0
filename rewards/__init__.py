"""Rewards that need a model or a world, one file a family: see `reward.FAMILIES`."""
