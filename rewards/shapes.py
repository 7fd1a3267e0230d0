"""The toy's verifier as a reward: a program that reads the objects off a picture's pixels."""

from reward import register
from toy import verify


@register("shapes")
def shapes(device):
    """1 if the picture shows exactly what the prompt asks for, else 0."""
    return verify
