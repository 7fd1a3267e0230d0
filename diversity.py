"""Beyond the paper: what keeps a policy as varied as the pretrained model.

Under GRPO every prompt settles on a few layouts.  Chance makes one way of being right a little
likelier.  Its images are then drawn more often and rewarded more often, and a way that is no longer
drawn cannot come back.  A KL penalty is a weak cure: it pulls towards the reference's mistakes as
well, and pulls less and less towards what has become rare, for it is measured on the policy's own
images.  Two plug-ins of `argrpo.train` work against it.

`DiversityBonus` (an `advantage_fn`) moves reward, among the right images of a group, to those that
differ from the others.

`Rehearsal` (an `extra_loss`) lets the reference draw images, keeps those that the reward finds
right, and keeps them likely:

    loss = loss_GRPO - w E[ log pi(x) ],   x ~ pi_ref( . | right),

maximum likelihood beside the reward, as InstructGPT (arXiv 2203.02155) mixes in pretraining data,
on images chosen as in rejection-sampling fine-tuning (RAFT, arXiv 2304.06767), but those of the
pretrained model.  With enough of them the second term alone is smallest where
pi = pi_ref( . | right): always right, and as varied as the pretrained model's right images.  Its
pull on what has become rare does not fade.  The two terms agree, and no KL penalty is needed beside
them.
"""

import torch
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


def are_verdicts(rewards):
    """Whether rewards say only right (1) or wrong (0), or nothing (NaN)."""
    return bool(((rewards == 0) | (rewards == 1) | rewards.isnan()).all())


def right_images(rewards, group_size):
    """Which images of a group are right: rewards (P*G,) -> (P, G) bool.

    Verdicts are right at 1.  Graded rewards are right above their group's median, or at its maximum
    where more than half of a group share that, but not all.  A missing reward (NaN) is never
    right."""
    r = rearrange(rewards.float(), "(p g) -> p g", g=group_size)
    if are_verdicts(rewards):
        return r == 1
    above = r > r.nanmedian(dim=1, keepdim=True).values                              # (P, G)
    maximum = r.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)                     # (P, 1)
    _, _, flat = group_statistics(rewards, group_size)
    best = (r == maximum) & ~flat                                                    # (P, G)
    return torch.where(above.any(dim=1, keepdim=True), above, best)


# ---------------------------------------------------------------------------------------------
# The diversity bonus
# ---------------------------------------------------------------------------------------------

def diversity_bonus(rewards, features, group_size, weight):
    """Reward for right images that differ from the other right ones of their group.

    rewards (P*G,), features (P*G, ...) -> (P*G,):

        bonus_i = weight * unit * (d_i / mean(d) - 1),

    where d_i is the mean L1 distance of image i's features to those of the group's other right
    images.  It sums to zero in every group: it moves reward among the right images, and never pays
    for a wrong one.  Fewer than three right images share nothing.

    The unit is 1 for verdicts, and the group's standard deviation for graded rewards (see
    `right_images`).  Where all of a group are right, the bonus is all that its advantages are made
    of, and dividing by their spread cancels the weight."""
    x = rearrange(features.float().flatten(1), "(p g) f -> p g f", g=group_size)
    right = right_images(rewards, group_size)                                        # (P, G)
    unit = 1.0
    if not are_verdicts(rewards):
        _, unit, _ = group_statistics(rewards, group_size)                           # (P, 1)
    n = right.sum(dim=1, keepdim=True)                                               # (P, 1)
    distances = torch.cdist(x, x, p=1) * right[:, None, :]       # (P, G, G), to right images only
    distance = distances.sum(dim=2) / (n - 1).clamp(min=1)       # (P, G); to oneself it is 0
    mean = (distance * right).sum(dim=1, keepdim=True) / n.clamp(min=1)              # (P, 1)
    bonus = weight * unit * (distance / mean.clamp(min=1e-12) - 1)
    nothing = ~right | (n < 3) | (mean == 0)
    return rearrange(bonus.masked_fill(nothing, 0.0), "p g -> (p g)")


class DiversityBonus:
    """An `advantage_fn` of `argrpo.train`: advantages of the rewards with `diversity_bonus` added.

    It compares images by their pixels, or by the codebook vectors of their tokens."""

    def __init__(self, vq, config, weight, distance="pixels"):
        self.vq, self.config, self.weight, self.distance = vq, config, weight, distance

    def __call__(self, rewards, images, tokens, index, step):
        features = images                                                            # (B, 3, H, W)
        if self.distance == "codes":
            features = self.vq.quantize.codes()[tokens]                              # (B, N, C)
        G = self.config.group_size
        bonus = diversity_bonus(rewards, features, G, self.weight)
        return group_advantages(rewards + bonus, G, scale=self.config.scale_advantages)


# ---------------------------------------------------------------------------------------------
# Rehearsal
# ---------------------------------------------------------------------------------------------

class Rehearsal:
    """The second term above, as an `extra_loss` of `argrpo.train`.

    weight is w.  Of every prompt the reference draws `groups` times config.group_size images when
    the prompt first comes up.  The right ones (see `right_images`) are remembered and used again:
    the more often a prompt comes up, the more groups it needs, lest the policy learn a few images
    by heart.  A run that is to continue exactly has to save `remembered`."""

    def __init__(self, reference, vq, prompts, reward_fn, config, weight, groups):
        self.reference, self.vq, self.prompts = reference, vq, prompts
        self.reward_fn, self.config = reward_fn, config
        self.weight, self.groups = weight, groups
        self.device = next(reference.parameters()).device
        self.remembered = {}                     # prompt -> tokens (n, N) of its right images

    def remember(self, index, step):
        """Lets the reference draw those prompts at index (P,) that come up for the first time."""
        new = [k for k in dict.fromkeys(index.tolist()) if k not in self.remembered]
        if not new:
            return
        for some in torch.tensor(new).split(self.config.rollout_prompts or len(index)):
            right = {k: [] for k in some.tolist()}
            for group in range(self.groups):
                key = (self.config.seed, "rehearsal", step, some[0].item(), group)
                drawn = self.draw_right(some, argrpo.rng_for(self.device, *key))
                for k, tokens in zip(right, drawn):
                    right[k].append(tokens)
            self.remembered |= {k: torch.cat(groups) for k, groups in right.items()}

    @torch.no_grad()
    def draw_right(self, index, generator):
        """One group of each prompt at index (P,): a list of the right ones' tokens (n, N)."""
        c, G = self.config, self.config.group_size
        tokens, _, images = argrpo.draw_images(
            self.reference, self.vq, self.prompts, index, generator, samples_per_prompt=G,
            micro_batch=c.micro_batch, cfg_scale=c.cfg_scale, temperature=c.temperature)
        texts = [self.prompts.texts[k] for k in index.repeat_interleave(G).tolist()]
        rewards, _ = self.reward_fn(images, texts)
        right = right_images(rewards, G)                                             # (P, G)
        return [drawn[good] for drawn, good in zip(tokens.split(G), right)]

    def choose(self, index, step):
        """Half a group at most of each prompt's images: tokens (n, N), and their prompts (n,)."""
        rng = argrpo.rng_for("cpu", self.config.seed, "rehearsed", step)
        tokens, prompts = [], []
        for k in index.tolist():
            known = self.remembered[k].to(self.device)
            order = torch.randperm(len(known), generator=rng)
            tokens.append(known[order[:self.config.group_size // 2]])
            prompts += [k] * len(tokens[-1])
        return torch.cat(tokens), torch.tensor(prompts, dtype=torch.long)

    def __call__(self, model, index, step):
        """Adds the gradient for the prompts at index (P,) of a step: {"rehearsal": loss}."""
        self.remember(index, step)
        tokens, prompts = self.choose(index, step)                                   # (n, N), (n,)
        if len(tokens) == 0:                     # the reference got nothing right
            return {"rehearsal": 0.0}
        c, total = self.config, 0.0
        cfg_scale = c.cfg_scale if c.logprob_cfg == "guided" else 1.0
        for rows in torch.arange(len(tokens)).split(c.micro_batch or len(tokens)):
            _, cond, cond_mask = self.prompts.pick(prompts[rows], self.device)
            with argrpo.autocast(self.device):
                logp, _ = argrpo.token_logp(model, tokens[rows.to(self.device)], cond, cond_mask,
                                            cfg_scale=cfg_scale, temperature=c.temperature)
            loss = -logp.sum() / tokens.numel()                                  # nats a token
            (self.weight * loss).backward()
            total += loss.item()
        return {"rehearsal": total}
