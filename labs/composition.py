# %% [markdown]
# # Lab 7: why can LlamaGen not compose?
#
# "A blue triangle above a green square": small text-to-image models get the things right, and mix
# up what belongs to what.  In LlamaGen there is a reason in plain sight.  Its rotary table is
# *zero* at the condition positions, cosine and sine (`rope_table` in `argrpo.py`), so that queries
# and keys of words vanish.  A picture token's query meets every word's key with logit 0, so that
# it weighs all words of a caption alike, in every layer and every head.  It cannot look at one
# word.  It sees their mean.
#
# Users noticed the zeros in 2024 (LlamaGen's issue 54: "the text only takes effect via xv").  What
# do they cost?  `GPTConfig(cond_rope="still")` puts cosine 1 there, a rotation by nothing: words
# have queries and keys again.
#
# **You need**: section 1 of `argrpo.py`, `toy/models.py`, and checkpoints:
# `python labs/prepare.py --only zero,still,zero_plain,still_plain,zero_paper,still_paper`.
# **Time**: five minutes.
#
#     python labs/composition.py

# %%
import lab
import torch
import torch.nn as nn
from lab import COLOURS, OTHERS, over_seeds, plt, quick
from prepare import prepared, require, scenes, transformer

import argrpo
import toy
from pretrained import load_weights
from toy import pretraining

STARTS = ("zero", "still", "zero_paper", "still_paper", "zero_plain", "still_plain")
lab.begin("composition")
require(*STARTS)

KINDS = {                                        # captions, draws of each
    "counting": (toy.SEEN_CLASSES, quick(1, 8)),
    "position": (toy.SEEN_PAIRS[::quick(40, 4)], quick(1, 4)),
    "unseen counts": (toy.UNSEEN_CLASSES, quick(2, 40)),
    "unseen pairs": (toy.UNSEEN_PAIRS[::quick(10, 1)], quick(1, 4)),
}


def score(model, seed, plain=False):
    """{kind: share of right pictures}."""
    return {kind: lab.draw(model, draws, "t2i", texts, seed=seed,
                           plain=plain).right.mean().item()
            for kind, (texts, draws) in KINDS.items()}


# %% [markdown]
# ## 1. What the zeros cost
#
# Two toys are pretrained from nothing, alike in everything but the table; then both are trained
# with the paper's recipe.  A third and a fourth read captions without a crutch.  A word's feature
# in the toy stands for three things together: which word it is, where it stands, and in which
# relation the caption puts things, as T5's features know their context.  "Plain" features say
# which word it is and, apart from that, where it stands; what belongs together is left to the
# model.
#
# **Question 1.**  The mean of the words' features, as the toy has them, still holds the whole
# caption: which word stands where can be read off it.  So nothing is lost by averaging.  Why is it
# harder to compose from the mean all the same?  And what is in the mean of the plain ones?

# %%
def pretrained_toys(seed):
    """{checkpoint: {kind: share}}."""
    found = {}
    for name in STARTS:
        model = load_weights(transformer(name.split("_")[0]), prepared(name, seed))
        found[name] = score(model, seed, plain=name.endswith("plain"))
    return found


toys = over_seeds(pretrained_toys)

# %% [markdown]
# ## 2. What a picture token looks at
#
# The weights that the softmax gives to the words, while a picture is written, of the head that
# tells words apart most.  Without "still" the maps of all words would be one and the same.
#
# **Question 2.**  Find the word whose map has the shape of a thing in the picture.  In which rows
# is "above" looked at?

# %%
@torch.no_grad()
def attention_to_words(model, tokens, cond, cond_mask):
    """Weights (layers, heads, N, T) of each picture token on the words, for one picture."""
    maps, handles = [], []

    def record(attention, inputs):
        x, rope, mask = inputs
        q, k, _ = attention.qkv(x, rope)                             # (1, H, positions, C/H)
        logits = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)[0]
        T = cond.shape[1]
        maps.append(weights[:, T - 1:, :T])                          # (H, N, T)

    for layer in model.layers:
        handles.append(layer.attention.register_forward_pre_hook(record))
    model.hidden(tokens, cond, cond_mask)
    for handle in handles:
        handle.remove()
    return torch.stack(maps)


CAPTION = "a red circle above a blue square"


def maps_of(seed):
    """{"words", "maps" (words, 36) of the most selective head, "picture"} of the "still" toy."""
    model = load_weights(transformer("still"), prepared("still", seed))
    drawn = lab.draw(model, 8, "t2i", [CAPTION], seed=seed)
    one = drawn.right.argmax().item()                                # a right one, if there is
    prompts = lab.prompts_of("t2i", [CAPTION])
    weights = attention_to_words(model, drawn.tokens[one:one + 1], prompts.cond, prompts.cond_mask)
    words = CAPTION.split()
    weights = weights[..., -len(words):]                             # without the padding
    apart = (weights / weights.sum(-1, keepdim=True)).std(-1).mean(-1)       # (layers, heads)
    layer, head = divmod(apart.flatten().argmax().item(), weights.shape[1])
    return {"words": words, "maps": weights[layer, head].T.tolist(), "head": [layer, head],
            "picture": lab.packed(drawn.images[[one] * 4])}


maps = over_seeds(maps_of)

# %% [markdown]
# ## 3. Can it be switched on afterwards?
#
# The published weights were trained with zeros.  Putting cosine 1 there at once changes what every
# layer computes.  A gentler way is a gate for each layer and head in the place of the cosine, that
# starts at 0, so that nothing changes at first, and is trained with the rest.  Only these few lines
# are new:

# %%
GATE_SPEED = 20              # AdamW moves every parameter by about lr, and gates have a longer way:
                             # the cosine is 20 times the parameter


def add_gates(model):
    """Gives the shipped toy a gate for each head, at 0: it computes what it did, bit for bit."""
    T = model.config.cls_token_num
    model.rope[:T, :, 0] = 1.0                                       # "still"
    for layer in model.layers:
        attention = layer.attention
        attention.gate = nn.Parameter(torch.zeros(attention.n_head))
        attention.qkv = gated_qkv(attention, attention.qkv, T)
    return model


def gated_qkv(attention, qkv, T):
    def gated(x, rope):
        q, k, v = qkv(x, rope)
        if x.shape[1] > 1:                       # not a decoding step, which has no word in it
            gate = torch.ones(attention.n_head, x.shape[1], 1)
            words = (GATE_SPEED * attention.gate)[:, None, None].expand(-1, min(T, x.shape[1]), 1)
            gate = torch.cat([words, gate[:, T:]], dim=1)            # (H, positions, 1)
            q, k = q * gate, k * gate
        return q, k, v
    return gated


def switch_at_once(model):
    model.rope[:model.config.cls_token_num, :, 0] = 1.0
    return model


SWITCHES = {"zeros kept": lambda model: model, "cosine 1 at once": switch_at_once,
            "gates": add_gates}
LIKELIHOOD, RL = quick(5, 400), quick(2, 60)


def by_likelihood(model, seed):
    tokens, prompts = data
    return pretraining.pretrain_gpt(model, tokens, prompts,
                                    pretraining.random_stream(seed, "switch"), LIKELIHOOD, lr=1e-3)


def by_grpo(model, seed):
    config = argrpo.GRPOConfig(steps=RL, seed=seed, prompts_per_step=16, group_size=8, lr=1.2e-3,
                               kl_beta=0.0)
    for _ in lab.train(model, config, task="t2i"):
        pass
    return model


def switched(seed):
    """{way: {kind: share}} of the shipped toy, fine-tuned."""
    global data
    data = scenes(seed, quick(200, 6000))
    found = {"shipped": score(toy.load("t2i")[0], seed)}
    for name, switch in SWITCHES.items():
        model = by_likelihood(switch(toy.load("t2i")[0]), seed)
        found[f"{name}, likelihood"] = score(model, seed)
        if name != "cosine 1 at once":
            opened = sizes(model)
            found[f"{name}, likelihood, then GRPO"] = score(by_grpo(model, seed), seed)
            only = switch(toy.load("t2i")[0])
            found[f"{name}, GRPO"] = score(by_grpo(only, seed), seed)
            if name == "gates":
                found["size of the gates"] = {"likelihood": opened, "GRPO": sizes(only)}
    return found


def sizes(model):
    """The mean size of each layer's gates, of those that have some."""
    gates = [layer.attention.gate for layer in model.layers if hasattr(layer.attention, "gate")]
    return [GATE_SPEED * gate.abs().mean().item() for gate in gates]


afterwards = over_seeds(switched)

# %% [markdown]
# **Question 3.**  On LlamaGen's XL (36 layers, 20 heads) how many new numbers are these gates, and
# what do they cost in a step?
#
# **Question 4.**  Which of likelihood and reward opens the gates, and what does your answer say
# about fine-tuning the published weights, for which nobody has the pretraining data?

# %%
fig = plt.figure(figsize=(11, 6.2), layout="constrained")
top, bottom = fig.subfigures(2, 1, height_ratios=(1.25, 1))
bars, late = top.subplots(1, 2)
NAMES = {"zero": ("zeros", COLOURS["base"]), "still": ("words can be looked at", OTHERS[0]),
         "zero_paper": ("zeros, paper's recipe", COLOURS["paper"]),
         "still_paper": ("looked at, paper's recipe", OTHERS[3]),
         "zero_plain": ("zeros, plain features", "#bbbbbb"),
         "still_plain": ("looked at, plain features", OTHERS[1])}


def bar_chart(ax, runs, names):
    """Groups of bars: a group for each kind, a bar for each name, whiskers over the seeds."""
    width = 0.8 / len(names)
    for k, (name, (label, colour)) in enumerate(names.items()):
        values = torch.tensor([[found[name][kind] for kind in KINDS] for found in runs])
        mean = values.mean(0)
        ends = torch.stack([mean - values.amin(0), values.amax(0) - mean]).clamp(min=0)
        ax.bar(torch.arange(len(KINDS)) + k * width, mean, width, yerr=ends.numpy(), color=colour,
               label=label, error_kw={"linewidth": 0.8})
    ax.set(xticks=[j + 0.4 - width / 2 for j in range(len(KINDS))], xticklabels=list(KINDS),
           ylabel="share of right pictures", ylim=(0, 1.35))
    ax.legend(fontsize=6, ncols=2, loc="upper right")


bar_chart(bars, toys, NAMES)
bars.set_title("pretrained from nothing")
ways = [name for name in afterwards[0] if name != "size of the gates"]
palette = [COLOURS["base"], "#bbbbbb", "#dddddd", "#E69F00", "#8C6BB1", "#56B4E9", "#009E73",
           "#CC79A7"]
bar_chart(late, afterwards, {name: (name, colour) for name, colour in zip(ways, palette)})
late.set_title("switched on afterwards")
words = maps[0]["words"]
axes = bottom.subplots(1, len(words) + 1)
axes[0].imshow(lab.unpacked(maps[0]["picture"])[1:25, 1:25], interpolation="nearest")
axes[0].set_title("the picture", fontsize=8)
highest = max(max(row) for row in maps[0]["maps"])
for ax, word, weights in zip(axes[1:], words, maps[0]["maps"]):
    ax.imshow(torch.tensor(weights).view(6, 6), cmap="magma", vmin=0, vmax=highest)
    ax.set_title(word, fontsize=8)
for ax in axes:
    ax.axis("off")

rows = [["", *KINDS]]
for runs, names in ((toys, {name: label for name, (label, _) in NAMES.items()}),
                    (afterwards, {name: f"shipped toy: {name}" for name in ways})):
    for name, label in names.items():
        rows.append([label, *[lab.across([found[name][kind] for found in runs]) for kind in KINDS]])
for way in ("likelihood", "GRPO"):
    layers = zip(*[found["size of the gates"][way] for found in afterwards])
    rows.append([f"mean size of the gates after {way}, layer by layer",
                 *[lab.across(layer) for layer in layers], *[""] * (len(KINDS) - 3)])
lab.finish(fig, rows, "toy t2i: 1200 steps of pretraining, 75 of the paper's recipe; afterwards "
                      f"{LIKELIHOOD} steps of likelihood, {RL} of GRPO")
