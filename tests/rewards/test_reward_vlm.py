"""The three questions to a vision-language model: reading, repeating and missing answers."""

import math

import pytest
import torch

import rewards.vlm
from argrpo import group_advantages
from reward import build_rewards
from rewards.sources import SOURCES
from rewards.vlm import Fake, VisionLanguageModel, parse_score, vision_language_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_models():
    """No test sees another's model."""
    yield
    vision_language_model.cache_clear()


@pytest.mark.parametrize("answer, score", [
    ('The nose is blurred.\n{"score": 3.5}', 3.5),
    ("Score: 4", 4.0),
    ('{"score": 1} no, wait: {"score": 2}', 2.0),
    ("I cannot judge this.", math.nan),
    ('{"score": 7}', math.nan),
    ('{"score": -1}', math.nan),
    ("", math.nan),
    ("**Score:** 4", 4.0),
    ("**Score**: 3", 3.0),
    ("The sum is\n**Score: 2.5**", 2.5),
    ('{"score": "4.5"}', 4.5),
    ("{'score': '2'}", 2.0),
    ('{"score": .5}', 0.5),
    ('{"score": "-.5"}', math.nan),
    ("Score: 4.", 4.0),
    ("I score: nothing.", math.nan),
    ('{"score": "**"} 4', math.nan),
])
def test_scores_are_read_off_answers(answer, score):
    assert parse_score(answer, 5) == pytest.approx(score, nan_ok=True)


@pytest.fixture
def scripted(monkeypatch):
    """Installs a language model with a script, {brightness: answers, attempt by attempt}.

    Gives the list of what it was asked."""
    asked = []

    def use(script):
        def model(images, questions, attempt):
            asked.append((attempt, questions))
            return [script[round(image.mean().item(), 1)][attempt] for image in images]

        monkeypatch.setattr(rewards.vlm, "vision_language_model", lambda device: model)
        return asked

    return use


def grey(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4)


def test_an_answer_without_points_is_retried_then_missing(scripted):
    good, bad = '{"score": 4}', "hm"
    asked = scripted({0.1: [good], 0.2: [bad, good], 0.3: [bad, bad, bad]})
    prompts = ["a cat", "a dog", "a cow"]
    total, _ = build_rewards("qwen_label", CPU)(grey(0.1, 0.2, 0.3), prompts)
    assert total[:2].tolist() == [1.0, 1.0] and math.isnan(total[2])
    assert [(attempt, len(questions)) for attempt, questions in asked] == [(0, 3), (1, 2), (2, 1)]
    assert "a cow" in asked[2][1][0]


def test_missing_images_are_left_out_of_their_group(scripted):
    """Rewards (1, 0, missing, 0.5): the three that are known have mean and deviation 0.5."""
    four, none, two = '{"score": 4}', '{"score": 0}', '{"score": 2}'
    scripted({0.1: [four], 0.2: [none], 0.3: ["hm"] * 3, 0.4: [two]})
    total, _ = build_rewards("qwen_label", CPU)(grey(0.1, 0.2, 0.3, 0.4), ["x"] * 4)
    advantages = group_advantages(total, 4, eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0, 0.0, 0.0]))


@pytest.mark.parametrize("name, answer, score", [
    ("qwen_label", '{"score": 5}', 1.25),
    ("qwen_fake", '{"score": 1}', 0.25),
    ("qwen_weird", '{"score": 0}', 0.0),
])
def test_the_official_scales(name, answer, score, scripted):
    scripted({0.1: [answer]})
    total, _ = build_rewards(name, CPU)(grey(0.1), ["x"])
    assert total.tolist() == [score]


def test_a_long_batch_is_asked_a_few_images_at_a_time(scripted):
    asked = scripted({0.1: ['{"score": 1}'], 0.2: ['{"score": 0}']})
    scores = Fake(CPU, micro_batch=2)(grey(0.1, 0.2, 0.1), ["x"] * 3)
    assert scores.tolist() == [0.25, 0.0, 0.25]
    assert [len(questions) for _, questions in asked] == [2, 1]


def test_of_larger_pictures_fewer_are_asked_about_at_a_time(scripted):
    """The same number of pixels: what a language model needs of memory grows with them."""
    asked = scripted({0.1: ['{"score": 1}']})
    for side, sizes in ((256, [4, 1]), (512, [1] * 5), (1024, [1] * 5), (24, [4, 1])):
        del asked[:]
        Fake(CPU, micro_batch=4)(torch.full((5, 3, side, side), 0.1), ["x"] * 5)
        assert [len(questions) for _, questions in asked] == sizes


MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
         "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant "
)


def save_tiny_qwen(folder):
    """Qwen2.5-VL's real classes with random weights and eleven words, saved as it is published."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocabulary = [*MARKS, "<unk>", "score", "user", "assistant"]
    numbered = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(numbered, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = t.Qwen2TokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token=MARKS[0], eos_token=MARKS[2],
        additional_special_tokens=MARKS)
    t.Qwen2_5_VLProcessor(t.Qwen2VLImageProcessor(), tokenizer, t.Qwen2VLVideoProcessor(),
                          chat_template=TEMPLATE).save_pretrained(folder)
    text = {
        "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
              "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=5,
                                video_token_id=6, vision_start_token_id=3, vision_end_token_id=4)
    t.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


def test_a_small_qwen_answers_a_batch(monkeypatch, tmp_path):
    """Left padding, images as tensors, answers without the question."""
    save_tiny_qwen(tmp_path)
    monkeypatch.setitem(SOURCES, "qwen", str(tmp_path))
    model, images = VisionLanguageModel("cpu"), torch.rand(3, 3, 64, 64)
    state = torch.get_rng_state()
    for attempt in (0, 1):
        questions = ["score", "score user score user", "score score"]
        answers = model(images, questions, attempt)
        assert len(answers) == 3
        assert answers == model(images, questions, attempt)              # repeatable
    assert torch.equal(torch.get_rng_state(), state)         # leaves other randomness alone
    scores = Fake(CPU)(images, ["x"] * 3)
    assert torch.isnan(scores).all()                         # it never writes "score: 1"
