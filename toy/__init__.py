"""The toy: a world of shapes, small enough that all of AR-GRPO runs on a laptop's CPU.

Pictures are 24 x 24 pixels: circles, squares and triangles in red, green and blue on a dark grey
ground.  A prompt says what should be there,

    "two red circles"                            count x colour x shape: the 27 classes of c2i,
    "a blue triangle above a green square"       and, for t2i, two objects and where they are,

and since the world is procedural, a program can read the objects off a picture's pixels and say
whether the prompt came true: a miniature GenEval, the reward named "shapes".

    scenes.py        prompts, random scenes that fulfil them, pictures of the scenes
    verifier.py      from pixels back to scenes; whether they are right, and how varied
    models.py        the models' sizes, their conditions, and loading them
    pretraining.py   the models from nothing: the command `python -m toy`

The models are `VQModel` and `Transformer`, the very classes that hold LlamaGen, at small size.
They lie pretrained in `toy/weights/`, in LlamaGen's checkpoint format.

Pretraining stops early on purpose: the models know what scenes look like but get about half of
them wrong, which leaves reinforcement learning something to do.
"""

# ruff: noqa: F401, I001 (the imports are the names that the package offers)

from toy.models import CAPTION_DIM, CAPTION_LENGTH, CONFIGS, FOLDER, VQ_CONFIG, WORDS
from toy.models import as_prompts, encode_captions, load, shipped_spread
from toy.scenes import CLASSES, COUNTS, GROUND, PAIRS, PALETTE, PLACES, SHAPES, SIZE, THINGS
from toy.scenes import SEEN_CLASSES, SEEN_PAIRS, UNSEEN, UNSEEN_CLASSES, UNSEEN_PAIRS
from toy.scenes import Request, Thing, holds, make_scene, mixed, parse, render
from toy.verifier import coarse_layout, distinct_in, fulfils, read_scenes, spread, spread_by_prompt
from toy.verifier import verify, verify_all, verify_by_kind
