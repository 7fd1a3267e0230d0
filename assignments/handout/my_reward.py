"""Part 4.1: a reward of your own.

The task: the toy shall draw what the prompt asks for, and at least one of the shapes shall be
large, 10 of the 24 pixels or more (the mean of height and width).  The pretrained model draws such
pictures, but small shapes more often, and about four in ten of its pictures are wrong.

Your reward is tried out: the toy is trained for 40 steps with it, on the prompts for one or two
shapes, and a measure that you don't see looks at what it then draws: right pictures with a large
shape shall be many, and right ones shall not become fewer.  The first reward that comes
to mind is usually found out: the policy does what you pay for, not what you mean.

You may use what toy/ offers: toy.read_scenes(images) reads the shapes off pictures (None where
there is anything that is no clean shape), each with colour, shape, x, y, width and height in
pixels; toy.fulfils(scene, prompt) says whether a scene is exactly what a prompt asks for.
"""


def my_reward(images, prompts):
    """images (B, 3, 24, 24) in [0, 1], prompts B strings -> (B,) float tensor, higher is better."""
    raise NotImplementedError("part 4.1: my_reward")
