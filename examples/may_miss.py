"""A reward that cannot judge every picture: it says so with NaN, and carries `may_miss = True`.

    python train_c2i.py --reward shapes,examples/may_miss.py:centred:0.5 --out runs/centred

The picture is then left out of its group, and counted as `missing` in metrics.jsonl.
"""

import torch


def centred(images, prompts):
    """How near to the middle the content lies, from 0 (in a corner) to 1.

    Content is what differs from the upper left pixel.  A picture without any is not judged."""
    ground = images[:, :, :1, :1]
    content = (images - ground).abs().sum(dim=1)                         # (B, H, W)
    content = torch.where(content > 0.3, content, 0)
    height, width = content.shape[1:]
    rows = torch.linspace(-1, 1, height, device=images.device)
    columns = torch.linspace(-1, 1, width, device=images.device)
    total = content.sum(dim=(1, 2))                                      # (B,), 0 if there is none
    y = (content.sum(dim=2) * rows).sum(dim=1) / total                   # 0 / 0 is NaN
    x = (content.sum(dim=1) * columns).sum(dim=1) / total
    return 1 - (x.square() + y.square()).sqrt() / 2 ** 0.5


centred.may_miss = True
