"""GenEval (arXiv 2310.11513) as a reward: does the image meet what its composition demands?

The prompt follows one of GenEval's templates over COCO's objects ("a photo of a red bus left of a
bench"), which `captions` reads.  A COCO detector finds the objects, and CLIP ViT-L/14 names the
colour of each one, cut out on grey.  A demand is an object in its number (exactly, where it is
counted), its colour, or its place.

Where this departs from the published GenEval: it detects with torchvision's Mask R-CNN in the place
of Mask2Former, and it gives the share of the demands that are met, where GenEval gives 1 for all of
them and else 0.
"""

import torch
from torch import nn
from torchvision.models import detection

from captions import COLOUR_NAMES, coco_objects, requirements
from reward import register
from rewards.clip import CLIP_L, open_clip_tower
from rewards.sources import frozen, with_weights

COLOUR_TEXTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


def place_of(box, other, slack=0.1):
    """Where a box (x1, y1, x2, y2) is, seen from the other one: a set of "left of", "above", ...

    GenEval's rule: the centres must differ by more than a tenth of the two boxes' sizes, and a
    direction counts if more than half of the distance goes that way."""
    offset = (box[:2] + box[2:] - other[:2] - other[2:]) / 2             # of the centres
    sizes = (box[2:] - box[:2]) + (other[2:] - other[:2])
    clear = (offset.abs() - slack * sizes).clamp(min=0) * offset.sign()
    x, y = clear / offset.norm().clamp(min=1e-6)
    shares = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {place for place, share in shares.items() if share > 0.5}


@register("geneval")
class GenEval:
    """The share of a composition's demands that are met, 1 if all are."""

    def __init__(self, device):
        weights = detection.MaskRCNN_ResNet50_FPN_V2_Weights.DEFAULT
        detector = with_weights("geneval", detection.maskrcnn_resnet50_fpn_v2, weights)
        self.detector = frozen(detector, device)
        self.tower = open_clip_tower(CLIP_L, device)

    def colours(self, image, found, name):
        """The colour of each found object, by name."""
        grey = torch.full_like(image, 0.6)
        crops = []
        for box, mask in zip(found["boxes"], found["masks"]):
            x1, y1, x2, y2 = box.round().int().tolist()
            x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)                    # at least one pixel
            crops.append(torch.where(mask > 0.5, image, grey)[:, y1:y2, x1:x2])
        texts = [text.format(colour, name) for colour in COLOUR_NAMES for text in COLOUR_TEXTS]
        features = self.tower.text_features(texts)                       # (colours * texts, C)
        features = features.view(len(COLOUR_NAMES), len(COLOUR_TEXTS), -1).mean(dim=1)
        features = nn.functional.normalize(features, dim=-1)             # (colours, C)
        # One by one, for they differ in size.  The tower keeps their aspect: see `preprocess`.
        seen = torch.cat([self.tower.image_features(crop[None]) for crop in crops])
        cosines = seen @ features.T
        return [COLOUR_NAMES[k] for k in cosines.argmax(dim=-1).tolist()]

    def judge(self, image, detections, demands):
        """The share of demands that one image meets."""
        met, groups = [], []                     # groups: the found objects of each demand
        for demand in demands:
            count = demand["count"]
            threshold = 0.9 if count > 1 else 0.3            # what is counted must be surer
            sure = detections["scores"] > threshold
            sure &= detections["labels"] == coco_objects()[demand["class"]]
            number = int(sure.sum())
            enough = number == count if count > 1 else number > 0
            met.append(enough)
            # The detector lists its surest finds first.
            found = {key: value[sure][:count] for key, value in detections.items()}
            if "color" in demand:
                met.append(enough and set(self.colours(image, found, demand["class"])) == {
                    demand["color"]})
            if "position" in demand:
                place, target = demand["position"]
                places = [place_of(box, other)
                          for box in found["boxes"] for other in groups[target]["boxes"]]
                met.append(bool(places) and all(place in some for some in places))
            groups.append(found)
        return sum(met) / len(met)

    def check_prompts(self, prompts):
        """Raises ValueError for a prompt that follows none of the templates."""
        for prompt in prompts:
            requirements(prompt)

    def __call__(self, images, prompts):
        demands = [requirements(prompt) for prompt in prompts]
        found = [one for part in images.float().split(8) for one in self.detector(list(part))]
        return torch.tensor([self.judge(*case) for case in zip(images, found, demands)])
