"""Beyond the paper: what keeps a policy as varied as the pretrained model.

Under GRPO every prompt settles on a few layouts.  Chance makes one way of being right a little
likelier.  Its images are then drawn more often and rewarded more often, and a way that is no longer
drawn cannot come back.  A KL penalty is a weak cure: it pulls towards the reference's mistakes as
well, and pulls less and less towards what has become rare, for it is measured on the policy's own
images.  Two plug-ins of `argrpo.train` work against it.  Both look at images that the reference
draws and that the reward finds right: pi_ref( . | right) is what a policy should become, always
right and as varied as the pretrained model is when it is right.

`Rehearsal` (an `extra_loss`) keeps them likely:

    loss = loss_GRPO - w E[ log pi(x) ] / N,   x ~ pi_ref( . | right), of N tokens,

maximum likelihood beside the reward, as InstructGPT (arXiv 2203.02155) mixes in pretraining data,
on images chosen as in rejection-sampling fine-tuning (RAFT, arXiv 2304.06767), but those of the
pretrained model.  With enough of them the second term alone is smallest where
pi = pi_ref( . | right).  Its pull on what has become rare does not fade, and that policy is always
right: the two terms share an optimum, and no KL penalty is needed beside them.  `Rehearsal.alone`
comes before GRPO, and makes the reference's wrong images less likely, too.

`DiversityBonus` (an `advantage_fn`) compares the policy's right images with them, and favours those
of which the reference draws more.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

import argrpo
from argrpo import group_advantages, group_statistics

# ---------------------------------------------------------------------------------------------
# How varied, and what is right
# ---------------------------------------------------------------------------------------------

def group_diversity(images, group_size):
    """Mean L1 distance per pixel and channel between two images of a group, in [0, 1].

    images (P*G, 3, H, W) -> (P,)"""
    x = rearrange(images.float(), "(p g) c h w -> p g (c h w)", g=group_size)
    pairs = group_size * (group_size - 1)
    return torch.cdist(x, x, p=1).sum((1, 2)) / pairs / x.shape[-1]


def right_images(rewards, group_size):
    """Which images of a group are right: rewards (P*G,) -> (P, G) bool.

    Verdicts are right at 1.  Graded rewards are right above their group's median, or at its maximum
    where more than half of a group share that, but not all.  A missing reward (NaN) is never
    right.  Verdicts with a weight other than 1 (--reward shapes:2) count as graded: where all of a
    group are right, none then is above the others."""
    r = rearrange(rewards.float(), "(p g) -> p g", g=group_size)
    if ((rewards == 0) | (rewards == 1) | rewards.isnan()).all():                    # verdicts
        return r == 1
    above = r > r.nanmedian(dim=1, keepdim=True).values                              # (P, G)
    maximum = r.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)                     # (P, 1)
    _, _, flat = group_statistics(rewards, group_size)
    return torch.where(above.any(dim=1, keepdim=True), above, (r == maximum) & ~flat)


# ---------------------------------------------------------------------------------------------
# Rehearsal
# ---------------------------------------------------------------------------------------------

def names_of(prompts):
    """A name for each prompt: its text, and its number where an earlier prompt of that text has
    another condition, as ImageNet's two classes "missile" have."""
    first, names = {}, []
    for k, text in enumerate(prompts.texts):
        equal = torch.equal(prompts.cond[k], prompts.cond[first.setdefault(text, k)])
        names.append(text if equal else f"{text} ({k})")
    return names


class Rehearsal:
    """The second term above, as an `extra_loss` of `argrpo.train`.

    weight is w.  Of every prompt the reference draws `groups` times config.group_size images when
    the prompt first comes up.  The right ones (see `right_images`) are remembered and used again:
    the more often a prompt comes up, the more groups it needs, lest the policy learn a few images
    by heart.  features, if given, describes them for a `DiversityBonus`.

    What is drawn depends on the prompt's name (`names_of`) and the seed, not on the step, the
    process or the prompts beside it: each prompt has a random stream of its own.  A run that is to
    continue without drawing again has to save `remembered`."""

    BETA = 0.5                   # of `unlikelihood`

    def __init__(self, reference, vq, prompts, reward_fn, config, weight, groups, features=None):
        self.reference, self.vq, self.prompts = reference, vq, prompts
        self.reward_fn, self.config, self.features = reward_fn, config, features
        self.weight, self.groups, self.names = weight, groups, names_of(prompts)
        self.device = next(reference.parameters()).device
        self.remembered, self.described = {}, {}     # name -> tokens (n, N) and features (n, ...)
        self.wrong = {}                              # name -> tokens (n, N)

    @torch.no_grad()
    def remember(self, index):
        """Lets the reference draw those prompts at index (P,) that come up for the first time, as
        many groups at once as a rollout has, and keeps the right images' tokens (n, N) and features
        (n, ...), which are empty without `features`."""
        new = {self.names[k]: k for k in index.tolist() if self.names[k] not in self.remembered}
        if not new:
            return
        c, G, N = self.config, self.config.group_size, self.reference.config.block_size
        count, room = self.groups * G, c.rollout_prompts or c.prompts_per_step
        rngs = [argrpo.rng_for(self.device, c.seed, "rehearsal", name, 0) for name in new]
        dtype = argrpo.finest_float(self.device)
        uniform = torch.cat([torch.rand(N, count, generator=rng, dtype=dtype,
                                        device=self.device).T for rng in rngs])
        index, drawn = torch.tensor(list(new.values())).repeat_interleave(self.groups), []
        for some, numbers in zip(index.split(room), uniform.split(room * G)):
            tokens, _, images = argrpo.draw_images(
                self.reference, self.vq, self.prompts, some, None, uniform=numbers,
                samples_per_prompt=G, micro_batch=c.micro_batch, cfg_scale=c.cfg_scale,
                temperature=c.temperature)
            texts = [self.prompts.texts[k] for k in some.repeat_interleave(G).tolist()]
            rewards, _ = self.reward_fn(images, texts)
            features = self.features.describe(images) if self.features else tokens[:, :0]
            right = right_images(rewards, G).flatten()
            drawn.append((tokens, features, right, ~right & ~rewards.isnan()))
        columns = [torch.cat(column).split(count) for column in zip(*drawn)]
        for name, tokens, features, right, wrong in zip(new, *columns):
            self.remembered[name], self.described[name] = tokens[right], features[right]
            self.wrong[name] = tokens[wrong]

    def choose(self, images, index, step):
        """Half a group at most of each prompt's images, {name: tokens (n, N)}, for a step: tokens
        (n, N), and their prompts (n,)."""
        rng = argrpo.rng_for("cpu", self.config.seed, "rehearsed", step)
        known = [images[self.names[k]] for k in index.tolist()]
        tokens = [some[torch.randperm(len(some), generator=rng)[:self.config.group_size // 2]]
                  for some in known]
        prompts = index.repeat_interleave(torch.tensor([len(some) for some in tokens]))
        return torch.cat(tokens).to(self.device), prompts

    def __call__(self, model, index, step):
        """Adds the gradient for the prompts at index (P,) of a step: {"rehearsal": loss}."""
        self.remember(index)
        loss = self.add_gradient(model, self.remembered, index, step, lambda logp, *given: -logp)
        return {"rehearsal": loss}

    def add_gradient(self, model, images, index, step, loss_of):
        """Adds weight times the gradient of a loss, and returns the loss, in nats a token: the sum
        of loss_of(log pi (B, N), the other arguments of `policy_logp`) over what `choose` takes of
        the images, divided by the number of its tokens."""
        tokens, prompts = self.choose(images, index, step)                           # (n, N), (n,)
        c, total = self.config, 0.0
        if len(tokens) == 0:                     # the reference has drawn none
            return total
        for rows in torch.arange(len(tokens)).split(c.micro_batch or len(tokens)):
            given = self.prompts, prompts[rows], tokens[rows], c
            logp, _ = argrpo.policy_logp(model, *given)
            loss = loss_of(logp, *given).sum() / tokens.numel()
            (self.weight * loss).backward()
            total += loss.item()
        return total

    def unlikelihood(self, logp, *given):
        """The loss (B,) of wrong images: softplus(beta log pi(x) / pi_ref(x)) / beta (negative
        preference optimization, arXiv 2404.05868).  It stops pushing what has become unlikely."""
        with torch.no_grad():
            reference, _ = argrpo.policy_logp(self.reference, *given)
        return F.softplus(self.BETA * (logp - reference).sum(dim=1)) / self.BETA

    def alone(self, model, optimizer, steps, lr_factor, shard=(0, 1), sync=lambda model: None):
        """A generator: each `next` makes one of so many optimizer steps of rehearsal alone, which
        come before the first rollout and make the policy right more often without a picture of its
        own: right images become likelier, and as many wrong ones of the reference less likely.  The
        learning rate falls from lr_factor * config.lr to 0, after config.warmup_steps; this is less
        noisy than a reward, and can learn faster.  shard and sync are as in `argrpo.train`."""
        c, (rank, size), group = self.config, shard, optimizer.param_groups[0]
        for step in range(steps):
            index = argrpo.pick_prompts(len(self.names), step, c.prompts_per_step, c.seed)
            index = index.chunk(size)[rank]
            logged = self(model, index, step - steps)
            logged["wrong"] = self.add_gradient(model, self.wrong, index, step - steps,
                                                self.unlikelihood)
            sync(model)
            group["lr"] = lr_factor * c.lr * min((step + 1) / c.warmup_steps, 1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
            yield logged


# ---------------------------------------------------------------------------------------------
# The diversity bonus
# ---------------------------------------------------------------------------------------------

class Pixels:
    """Images as a pyramid: what is compared are their means over 1 x 1, 3 x 3 and 24 x 24 cells.

    Pixels alone hardly tell a large shape from a small one; the mean of the whole image does."""

    def describe(self, images):
        """What is remembered of images (B, 3, H, W): (B, 3, 24, 24) uint8, or less if smaller."""
        cells = [min(24, side) for side in images.shape[-2:]]
        return F.adaptive_avg_pool2d(images.float(), cells).mul(255).round().byte()

    def levels(self, described):
        """[(B, features), ...], from coarse to fine."""
        x = described.float() / 255
        return [F.adaptive_avg_pool2d(x, n).flatten(1) for n in (1, 3)] + [x.flatten(1)]


def mean_distance(x, y):
    """Mean L1 distance of each of x (n, features) to all of y (m, features): (n,)."""
    return torch.cdist(x, y, p=1).mean(dim=1)


def unit_of(reference):
    """Mean distance between two of the reference's images (m, features)."""
    m = len(reference)                           # the distance to itself is 0, and does not count
    return (mean_distance(reference, reference).mean() * m / (m - 1)).clamp(min=1e-12)


def energy_witness(x, others, reference, unit, within=1.15):
    """Of which images does the reference draw more than the policy?

    x (n, features) are images of the policy, others (k, features) more of them, reference
    (m, features) the reference's.  Returns (n,)

        d_i = within * mean_j |x_i - x_j|  -  mean_k |x_i - r_k|,

    divided by unit, which is `unit_of(reference)`.  With `within` 1 this is the witness of the
    energy distance (Szekely and Rizzo, 2013), which is constant where both are equally distributed:
    what is far from the policy's own images, but near the reference's, is what the policy draws too
    rarely.  The default counts the policy's own distances a little more: it asks for a little more
    than the reference's diversity, against what reward takes away (docs/diversity.md has what that
    is worth)."""
    n = len(x) + len(others)
    own = mean_distance(x, torch.cat([x, others])) * n / (n - 1)     # the distance to itself is 0
    return (within * own - mean_distance(x, reference)) / unit


class DiversityBonus:
    """An `advantage_fn` of `argrpo.train`: `group_advantages`, and for the right images of a group
    what `energy_witness` says of them, averaged over the features' levels:

        A_i + weight * (d_i - mean of d over the group's right images).

    It moves advantage among a group's right images, and gives none to a wrong one.  It is added
    after the rewards were normalised, so that it counts as much where all of a group are right.
    The policy's images are the group's and those of the prompt's last RECENT groups.

    rehearsal is a `Rehearsal` that has `features`, and lets the reference's right images be drawn.
    gather(value) returns the values of all processes, so that each remembers the groups of all.  A
    run that is to continue exactly has to save `recent`."""

    RECENT = 4

    def __init__(self, rehearsal, weight, gather=lambda value: [value]):
        self.rehearsal, self.weight, self.gather = rehearsal, weight, gather
        self.recent, self.units = {}, {}         # name -> features (n, ...) of its last groups, and
                                                 # -> `unit_of` each level

    def __call__(self, rewards, images, tokens, index, step):
        c, features = self.rehearsal.config, self.rehearsal.features
        self.rehearsal.remember(index)
        right = right_images(rewards, c.group_size)                                  # (P, G)
        described = features.describe(images).unflatten(0, (-1, c.group_size))
        bonus, seen = torch.zeros_like(right, dtype=torch.float32), []
        for p, k in enumerate(index.tolist()):
            name, x = self.rehearsal.names[k], described[p, right[p]]                # (n, ...)
            bonus[p, right[p]] = self.of_group(name, x)
            seen.append((name, x.cpu()))
        for groups in self.gather(seen):
            for name, x in groups:
                self.recent[name] = [*self.recent.get(name, []), x][-self.RECENT:]
        return group_advantages(rewards, c.group_size, scale=c.scale_advantages) + bonus.flatten()

    def of_group(self, name, x):
        """The bonus (n,) of a group's right images, whose features are x (n, ...)."""
        levels, reference = self.rehearsal.features.levels, self.rehearsal.described[name]
        if len(x) < 2 or len(reference) < 2:     # nothing to move, or nothing to compare with
            return torch.zeros(len(x), device=x.device)
        # x[:0]: there may be no earlier groups yet.
        others = torch.cat([x[:0], *(past.to(x.device) for past in self.recent.get(name, []))])
        of_reference = levels(reference.to(x.device))
        if name not in self.units:
            self.units[name] = [unit_of(level) for level in of_reference]
        compared = list(zip(levels(x), levels(others), of_reference, self.units[name]))
        d = sum(energy_witness(*level) for level in compared) / len(compared)
        return self.weight * (d - d.mean())
