"""A right answer to part 4.1: rightness is a condition, and among right pictures size pays."""

import torch

import toy


def my_reward(images, prompts):
    rewards = []
    for scene, prompt in zip(toy.read_scenes(images), prompts):
        if not toy.fulfils(scene, prompt):
            rewards.append(0.0)
            continue
        largest = max((thing.width + thing.height) / 2 for thing in scene)
        rewards.append(1.0 if largest >= 10 else 0.3)
    return torch.tensor(rewards)
