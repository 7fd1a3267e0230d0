"""What is graded besides the functions: the reward, the runs to debug, and the whole file.

What trains runs in a child of grade.py (sandbox.py), for it exchanges modules.
"""

import copy
import sys
import types

import torch
from faults import FAULTS
from source import ITEMS, tomllib

# The open task: pictures that are right and have a shape of at least 10 pixels.  (Two such shapes
# hardly fit into a picture.)  Of the pretrained toy's pictures these are 20 to 25%, and 62% are
# right.  With a reward that sees both they become 53 and 54%, and 61 to 66% are right; with one for
# size alone 35 to 40%, and 43 to 53% are right: hence the second measure, from WRONG to RIGHT.
LARGE, PRETRAINED, FULL = 10.0, 0.23, 0.45
WRONG, RIGHT = 0.46, 0.56


def load(text, name="argrpo"):
    """A submission's file as the module of that name, which all later imports get."""
    module = types.ModuleType(name)
    module.__file__ = f"{name}.py"
    sys.modules[name] = module
    exec(compile(text, f"{name}.py", "exec"), vars(module))
    return module


def world(argrpo):
    """The toy with that argrpo module: (argrpo, toy, model, vq)."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("toy", "pretrained", "diversity")]:
        del sys.modules[name]
    sys.modules["argrpo"] = argrpo
    import toy
    return toy, *toy.load("c2i")


def train(argrpo, toy, model, vq, texts, reward, **settings):
    """Trains the toy's model on the texts, as train_toy.py does: yields a Step after each step."""
    labels = torch.tensor([toy.CLASSES.index(text) for text in texts])
    config = argrpo.GRPOConfig(steps=40, lr=1.5e-3, micro_batch=None, **settings)
    yield from argrpo.train(model, copy.deepcopy(model), vq, argrpo.Prompts(texts, labels), reward,
                            config, argrpo.make_optimizer(model, config))


# ---------------------------------------------------------------------------------------------
# 4.1: a reward of one's own
# ---------------------------------------------------------------------------------------------

def right_and_large(toy, images, texts):
    """The hidden measure: which pictures are right and have a large shape.  (B,) bool."""
    return torch.tensor([
        toy.fulfils(scene, text) and max((t.width + t.height) / 2 for t in scene) >= LARGE
        for scene, text in zip(toy.read_scenes(images), texts)])


def measure_reward(argrpo, text, seed):
    """Trains the toy with the submission's reward: what share of its pictures are as wanted."""
    if text is None:
        raise ValueError("there is no my_reward.py in the submission")
    toy, model, vq = world(argrpo)
    reward = load(text, "my_reward").my_reward
    texts = [name for name in toy.CLASSES if not name.startswith("three")]

    def reward_fn(images, prompts):
        rewards = torch.as_tensor(reward(images, prompts)).float()
        if rewards.shape != (len(images),):
            raise ValueError(f"my_reward must return ({len(images)},), one number a picture, not "
                             f"{tuple(rewards.shape)}")
        return rewards, {}

    for _ in train(argrpo, toy, model, vq, texts, reward_fn, prompts_per_step=4, group_size=12,
                   seed=seed):
        pass
    prompts = argrpo.Prompts(texts, torch.tensor([toy.CLASSES.index(text) for text in texts]))
    rng = argrpo.rng_for("cpu", seed, "measure")
    index = torch.arange(len(texts))
    _, _, images = argrpo.draw_images(model, vq, prompts, index, rng, samples_per_prompt=16)
    drawn = [text for text in texts for _ in range(16)]
    return (right_and_large(toy, images, drawn).float().mean().item(),
            toy.verify(images, drawn).mean().item())


def score_reward(outcome, item):
    """(score, points, output) of the Outcome of measure_reward."""
    if outcome.error.startswith("NotImplementedError: part"):
        return 0.0, item["points"], f"not done yet ({outcome.error.split(': ', 1)[1]})"
    if outcome.error:
        return 0.0, item["points"], f"{outcome.error}\nRead {item['read']}."
    wanted, right = outcome.value
    share = (min(1.0, max(0.0, (wanted - PRETRAINED) / (FULL - PRETRAINED)))
             * min(1.0, max(0.0, (right - WRONG) / (RIGHT - WRONG))))
    says = f"after 40 steps with it, {right:.0%} of the pictures are right (62% before)"
    if share == 1:
        return float(item["points"]), item["points"], f"{says}; the hidden measure is met"
    hacked = ("The policy found another way to your reward than the one you meant."
              if right < RIGHT else "Your reward does not ask for all that the task asks for.")
    return (item["points"] * share, item["points"], f"{says}; of what the task asks for, "
            f"{share:.0%} is reached.\n{hacked} Read {item['read']}.")


# ---------------------------------------------------------------------------------------------
# 4.2: debug this run
# ---------------------------------------------------------------------------------------------

def score_debug(text, key):
    """[(run, score, points, output), ...], the points of part 4.2 shared by the runs.

    text is answers.toml, or None; key is {run: {"fault", "shows": {metric: [steps]}}}."""
    problem, answers = "there is no answers.toml in the submission", {}
    if text is not None:
        try:
            answers, problem = tomllib.loads(text), ""
        except tomllib.TOMLDecodeError as error:
            problem = f"answers.toml cannot be read: {error}"
    each = ITEMS["4.2"]["points"] / len(key)
    return [(run, *score_answer(answers.get(run, {}), truth, problem, each))
            for run, truth in key.items()]


def score_answer(answer, truth, problem, points):
    """(score, points, output): half of the points for the fault, half for what shows it."""
    if problem or not isinstance(answer, dict) or not answer.get("fault"):
        return 0.0, points, problem or "not done yet (part 4.2)"
    for name in ("fault", "metric"):
        if not isinstance(answer.get(name, ""), str):
            return 0.0, points, f"{name} must be one name in quotes, not {answer[name]!r}"
    fault, metric, step = answer["fault"], answer.get("metric"), answer.get("step")
    score, lines = 0.0, []
    if fault not in FAULTS:
        lines.append(f"there is no fault {fault!r} in the list: see the README")
    elif fault == truth["fault"]:
        score += points / 2
    else:
        lines.append(f"the fault is not {fault!r}, which would be: {FAULTS[fault].says}")
    if metric not in truth["shows"]:
        lines.append(f"{metric!r} does not tell this fault from others, or not directly")
    elif step not in truth["shows"][metric]:
        lines.append(f"at step {step!r} {metric} does not show it")
    else:
        score += points / 2
    return score, points, "\n".join(lines) or "fault, metric and step are right"


# ---------------------------------------------------------------------------------------------
# The whole file
# ---------------------------------------------------------------------------------------------

def train_whole(text, seed):
    """Trains the toy for 40 steps with the submission's argrpo.py: the rewards of the steps."""
    argrpo = load(text)
    toy, model, vq = world(argrpo)

    def reward_fn(images, texts):
        return toy.verify(images, texts), {}

    return [step.metrics["reward"] for step in train(
        argrpo, toy, model, vq, toy.CLASSES, reward_fn, prompts_per_step=8, group_size=8,
        seed=seed)]


def describe_whole(trained):
    """What is reported, for no points, about the file as a whole."""
    if trained.error:
        return f"training the toy with the whole of it fails: {trained.error}"
    first, last = trained.value[:8], trained.value[-8:]
    return (f"trained the toy for {len(trained.value)} steps: "
            f"{sum(first) / len(first):.0%} of the pictures right in the first eight, "
            f"{sum(last) / len(last):.0%} in the last eight")
