"""The toy's verifier as a reward: a program that reads the objects off a picture's pixels."""

from reward import register
from toy import parse, verify


@register("shapes")
class Shapes:
    """1 if the picture shows exactly what the prompt asks for, else 0."""

    def __init__(self, device):
        """The pictures bring their own device."""

    def check_prompts(self, prompts):
        """Raises ValueError for a prompt that asks for something the toy has not."""
        for prompt in prompts:
            parse(prompt)

    def __call__(self, images, prompts):
        return verify(images, prompts)
