"""Rehearsal: what keeps a policy as varied as the pretrained model while rewards make it right.

Under GRPO every prompt settles on a few layouts.  Chance makes one way of being right a little likelier, its images are
drawn more often and rewarded more often, and a way that is no longer drawn cannot come back.  A KL penalty is a weak cure:
it pulls towards the reference's mistakes as well, and pulls less and less towards what has become rare, for it is measured
on the policy's own images.

So let the reference draw images, keep those that the reward finds right, and keep them likely:

    L = L_GRPO - w E[ log pi(x) ],   x ~ pi_ref( . | right),

maximum likelihood beside the reward, as InstructGPT (arXiv 2203.02155) mixes in pretraining data, on images chosen as in
rejection-sampling fine-tuning (RAFT, arXiv 2304.06767), but those of the pretrained model.  With enough of them the second
term alone is smallest where pi = pi_ref( . | right): always right, and as varied as the pretrained model's right images.  Its
pull on what has become rare does not fade.  The two terms agree, and no KL penalty is needed beside them.
"""

import torch

import argrpo


class Rehearsal:
    """The second term, as an `extra_loss` of `argrpo.train`.

    weight is w above.  Of every prompt the reference draws `groups` times config.group_size images, when the prompt first
    comes up, and the right ones are remembered (for what is right see `argrpo.right_images`) and used again: the more
    often a prompt comes up, the more groups it needs, lest the policy learn a few images by heart.  A run that is to
    continue exactly has to save `remembered`."""

    def __init__(self, reference, vq, prompts, reward_fn, config, weight, groups):
        self.reference, self.vq, self.prompts, self.reward_fn = reference, vq, prompts, reward_fn
        self.config, self.weight, self.groups = config, weight, groups
        self.device = next(reference.parameters()).device
        self.remembered = {}                                     # prompt -> tokens (n, N) of its right images

    @torch.no_grad()
    def draw(self, index, step):
        """Draws for the prompts at index (P,), those of a step, that come up for the first time."""
        c, G = self.config, self.config.group_size
        new = [k for k in dict.fromkeys(index.tolist()) if k not in self.remembered]
        for some in torch.tensor(new, dtype=torch.long).split(c.rollout_prompts or len(index)) if new else ():
            texts, cond, cond_mask = self.prompts.pick(some, self.device)
            right = {k: [] for k in some.tolist()}
            for group in range(self.groups):
                rng = argrpo.rng_for(self.device, c.seed, "rehearsal", step, some[0].item(), group)
                with argrpo.autocast(self.device):
                    tokens, _ = argrpo.generate(self.reference, cond, cond_mask, samples_per_prompt=G, cfg_scale=c.cfg_scale,
                                                temperature=c.temperature, generator=rng)          # (P * G, N)
                images = argrpo.paint(self.vq, tokens, c.micro_batch or len(tokens))
                rewards, _ = self.reward_fn(images, [text for text in texts for _ in range(G)])
                for k, drawn, good in zip(right, tokens.split(G), argrpo.right_images(rewards, G)):
                    right[k].append(drawn[good])
            self.remembered |= {k: torch.cat(groups) for k, groups in right.items()}

    def __call__(self, model, index, step):
        """Adds the gradient for the prompts at index (P,), from half a group of each one's images: {"rehearsal": loss}."""
        self.draw(index, step)
        c, rng = self.config, argrpo.rng_for("cpu", self.config.seed, "rehearsed", step)
        some = [self.remembered[k].to(self.device) for k in index.tolist()]
        some = [t[torch.randperm(len(t), generator=rng)[:c.group_size // 2]] for t in some]
        tokens = torch.cat(some)                                                                   # (n, N)
        if not len(tokens):                                      # the reference got nothing right
            return {"rehearsal": 0.0}
        prompt = index.repeat_interleave(torch.tensor([len(t) for t in some]))                     # (n,)
        cfg_scale, total = c.cfg_scale if c.logprob_cfg == "guided" else 1.0, 0.0
        for rows in torch.arange(len(tokens)).split(c.micro_batch or len(tokens)):
            _, cond, cond_mask = self.prompts.pick(prompt[rows], self.device)
            with argrpo.autocast(self.device):
                logp, _ = argrpo.token_logp(model, tokens[rows.to(self.device)], cond, cond_mask, cfg_scale=cfg_scale,
                                            temperature=c.temperature)
            loss = -logp.sum() / tokens.numel()                  # nats per token
            (self.weight * loss).backward()
            total += loss.item()
        return {"rehearsal": total}
