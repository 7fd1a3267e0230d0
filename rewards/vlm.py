"""Realism: three questions to a vision-language model, Qwen2.5-VL-3B.

Where this departs from the official AR-GRPO code:

1. The questions are reworded.  They ask for the same things with the same points: five criteria
   for the label, 0 to 5; made by an AI or not, 0 or 1; anything strange or not, 0 or 1.  But the
   models may answer another wording otherwise.
2. The answer is greedy: each token is the most likely one.  Only if it holds no points, the model
   is asked again, with randomness, twice at most.  The official code also asks three times at most,
   always with the model's own settings.
3. An image that gets no points is missing (NaN), and is left out of its group.  Officially its
   reward is 0, as if it had been judged bad.  Points out of range count there, too; here they do
   not.
4. The model sees the pixels as they are.  Officially the image is first compressed as a JPEG.
"""

import functools
import math
import re

import torch

from reward import register, to_uint8
from rewards.sources import frozen, weights_of

LABEL = (
    'This picture was generated for the text: "{prompt}". Judge it by five criteria, each worth '
    "0 to 1 points: it shows what the text asks for; its subject is complete; it looks real and "
    "plausible; it is sharp and clear; it has no noise or artifacts. Name the weakest point in a "
    "few words, then give the sum, from 0 to 5. "
)
FAKE = (
    "Look closely: was this picture made by an AI? Give 0 points if it was and 1 point if it is a "
    "real photograph. "
)
WEIRD = (
    "Look closely: is anything about this picture strange? Give 0 points if something is and "
    "1 point if nothing is. "
)
ANSWER_FORMAT = 'End your answer with one line of JSON: {"score": NUMBER}'


MARKUP = r"""[\s"'*_`]*"""                       # spaces, quotes and bold print beside the colon
SCORE = re.compile(rf"score{MARKUP}[:=]{MARKUP}(-?(?:\d+\.?\d*|\.\d+))", re.IGNORECASE)


def parse_score(answer, highest):
    """The last "score": NUMBER of an answer, or NaN where there is none from 0 to `highest`."""
    score = float((SCORE.findall(answer) or ["nan"])[-1])
    return score if 0 <= score <= highest else math.nan


class VisionLanguageModel:
    """Qwen2.5-VL: images and one question each -> answers as texts, a batch in one call."""

    def __init__(self, device):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        folder = weights_of("qwen")
        self.processor = AutoProcessor.from_pretrained(folder)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        self.model = frozen(model, device)

    def __call__(self, images, questions, attempt):
        """Attempt 0 is greedy, the others are random.  Each gives the same answers every time."""
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                 for text in questions]
        texts = self.processor.apply_chat_template(chats, add_generation_prompt=True,
                                                   tokenize=False)
        inputs = self.processor(text=texts, images=list(to_uint8(images)), padding=True,
                                padding_side="left", return_tensors="pt").to(self.model.device)
        policy = {"do_sample": True, "temperature": 0.6} if attempt > 0 else {"do_sample": False}
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(attempt)
            tokens = self.model.generate(**inputs, **policy, max_new_tokens=128)
        answers = tokens[:, inputs["input_ids"].shape[1]:]                # without the question
        return self.processor.batch_decode(answers, skip_special_tokens=True)


vision_language_model = functools.cache(VisionLanguageModel)         # one for all questions


class Ask:
    """The reward from one question: a quarter of the points in the answer, as in the official code.

    An image whose answer has no points is asked about again, twice at most, and is then missing.
    A micro-batch counts images of 256 x 256 pixels, of larger ones fewer: by arithmetic, 64 take
    2 GB on a GPU, beside the model's 8."""
    may_miss = True
    attempts = 3

    def __init__(self, device, micro_batch=64):
        self.micro_batch = micro_batch
        self.model = vision_language_model(device)

    def ask(self, images, prompts, attempt):
        """One score per image, NaN where the answer has no points."""
        questions = [self.question.format(prompt=prompt) + ANSWER_FORMAT for prompt in prompts]
        answers = self.model(images, questions, attempt)
        return torch.tensor([parse_score(answer, self.highest) / 4 for answer in answers])

    def __call__(self, images, prompts):
        scores = torch.full((len(prompts),), math.nan)
        larger = max(1, images[0, 0].numel() / 256 ** 2)
        for rows in torch.arange(len(prompts)).split(max(1, int(self.micro_batch / larger))):
            for attempt in range(self.attempts):
                open_rows = rows[scores[rows].isnan()]                   # still without points
                if len(open_rows):
                    texts = [prompts[i] for i in open_rows.tolist()]
                    scores[open_rows] = self.ask(images[open_rows], texts, attempt)
        return scores


@register("qwen_label")
class Label(Ask):
    """How well the image shows its prompt, by five criteria: in [0, 1.25]."""
    question, highest = LABEL, 5


@register("qwen_fake")
class Fake(Ask):
    """0.25 if the model takes the image for a photograph, 0 if for an AI's work."""
    question, highest = FAKE, 1


@register("qwen_weird")
class Weird(Ask):
    """0.25 if the model finds nothing strange about the image, else 0."""
    question, highest = WEIRD, 1
