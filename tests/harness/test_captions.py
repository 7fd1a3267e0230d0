"""Captions: reading files, composing and understanding, encoding as LlamaGen's training did."""

import json

import pytest
import torch
from conftest import tiny_model

import captions
from argrpo import token_logp
from captions import T5Captions, clean, coco_objects, compose, read_captions, requirements
from harness.choices import caption_encoder

# --- reading ---------------------------------------------------------------------------------

@pytest.mark.parametrize("text, cleaned", [
    ("  A  Red\tBird ", "a red bird"),
    ("caf\u00c3\u00a9 au lait", "caf\u00e9 au lait"),                    # UTF-8 read as Latin-1
    ("salt &amp; pepper", "salt & pepper"),
    ("salt &amp; pepper < 1 &euro;", "salt & pepper < 1 \u20ac"),
    ("it\u2019s", "it's"),
    ("a red\vbird\x1don\fa tree\u2028top", "a red bird on a tree top"),
    ("a red bird \u200b", "a red bird"),
])
def test_cleaning(text, cleaned):
    assert clean(text) == cleaned


FILES = {
    "lines.txt": "A red bird\n\n  two DOGS \na red bird\n",
    "list.json": json.dumps(["A red bird", "two dogs"]),
    "records.json": json.dumps([{"caption": "A red bird"}, {"caption": "Two dogs", "id": 3}]),
    "records.jsonl": '{"prompt": "A red bird", "tag": "colors"}\n\n{"text": "two dogs"}\n',
    "geneval.jsonl":
        '{"tag": "colors", "include": [{"class": "bird", "count": 1, "color": "red"}], '
        '"prompt": "a red bird"}\n'
        '{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}\n',
    "byte order mark.txt": "\ufeffa red bird\ntwo dogs",
    "UPPER.JSONL": '{"prompt": "A red bird"}\n{"prompt": "two dogs"}\n',
    "upper.Json": '\ufeff["A red bird", "two dogs"]',
    "UPPER.TXT": "A red bird\ntwo dogs",
    "no ending": "A red bird\ntwo dogs",
    "lines.ndjson": '{"text": "A red bird"}\n{"text": "two dogs"}\n',
    "windows.txt": "\ufeffA red bird\r\n\r\ntwo dogs\r\n",
    "windows.jsonl": '\ufeff{"text": "A red bird"}\r\n\r\n{"text": "two dogs"}\r\n',
    "old mac.txt": "A red bird\rtwo dogs\r",
    "separators.txt": "A red\u2028bird\n" + "two\vdogs",
    "separators.jsonl": '{"text": "A red\u2028bird"}\n{"text": "two\u2029dogs"}\n',
    "null.jsonl":
        '{"caption": null, "prompt": "A red bird"}\n{"caption": " ", "text": "two dogs"}\n',
    "invisible.txt":
        "a red bird\n&nbsp;\n\u200b\n \ufeff\n\u2060\u00a0\n&#8203;\n\u3164\ntwo dogs\n",
}


@pytest.mark.parametrize("name, content", FILES.items(), ids=FILES)
def test_every_kind_of_file(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_captions(tmp_path / name) == ["a red bird", "two dogs"]


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", b"\n  \n", "holds no captions"),
    ("empty.json", b"[]", "holds no captions"),
    ("latin.txt", "ein Vogel\nein roter V\u00f6gel".encode("latin-1"),
     r"latin.txt, line 2: byte 0xf6 is not UTF-8"),
    ("broken.json", b"[1, 2", "broken.json is not JSON"),
    ("other.jsonl", b'{"prompt": "a"}\n{"title": "b"}',
     r"other.jsonl, record 2: no caption there, nor under caption, prompt, text"),
    ("numbers.json", b"[1]", "record 1: no caption there"),
    ("null.json", b'[{"caption": null, "text": null}]', "record 1: no caption there"),
    ("number.json", b'[{"caption": 1, "text": "a"}]', "record 1: no caption there"),
    ("nbsp.json", b'["&nbsp;"]', "record 1: no caption there"),
    ("invisible.txt", "\ufeff\n\u200b\n&nbsp;".encode(), "holds no captions"),
    ("broken.jsonl", b'"a"\n"b', "broken.jsonl, line 2 is not JSON"),
    ("blank.jsonl", b'"a"\n\n\n"b', "blank.jsonl, line 4 is not JSON"),
    ("deep.json", b"[" * 100_000, "deep.json is not JSON"),
    ("table.csv", b"caption\na red bird\n", "table.csv: cannot read captions from .csv: write"),
    ("table.TSV", b"caption\na red bird\n", "table.TSV: cannot read captions from .tsv"),
    ("a.jsonl.gz", b"\x1f\x8b\x08", "cannot read captions from .gz"),
    ("a.yaml", b"- a red bird\n", "cannot read captions from .yaml"),
    ("json.txt", b'a red bird\n{"prompt": "two dogs"}', "json.txt, line 2 is JSON, not a caption"),
    ("list.txt", b'[\n  "a red bird"\n]', "list.txt, line 1 is JSON, not a caption"),
    ("json", b'[{"prompt": "two dogs"}]', "line 1 is JSON, not a caption"),
    ("16.txt", "a red bird\ntwo".encode("utf-16"), "line 1: byte 0xff is not UTF-8 .* iconv"),
    ("16.jsonl", '"a red bird"'.encode("utf-16-le"), "line 1: byte 0x00 is not UTF-8 .* iconv"),
])
def test_files_that_hold_no_captions(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of captions: .*nowhere.txt"):
        read_captions(tmp_path / "nowhere.txt")


def test_brackets_are_no_json(tmp_path):
    """Weights of words in captions for other models."""
    (tmp_path / "a.txt").write_text("{{{two}}} dogs\n[[red]] bird\n[sic] cat\n")
    assert read_captions(tmp_path / "a.txt") == ["{{{two}}} dogs", "[[red]] bird", "[sic] cat"]


# --- composing -------------------------------------------------------------------------------

def test_what_is_composed_is_understood():
    composed = compose(600)
    assert len(set(composed)) == 600
    assert composed == compose(600) and composed != compose(600, seed=1)
    wanted = [requirements(caption) for caption in composed]
    kinds = []                                   # objects, counted, coloured, placed
    for demands in wanted:
        assert all(demand["class"] in coco_objects() for demand in demands)
        first, last = demands[0], demands[-1]
        kinds.append((len(demands), first["count"] > 1, "color" in first, "position" in last))
    # Templates of one object can be exhausted: they may come up less often.
    for kind in [
        (1, False, False, False), (1, True, False, False), (1, False, True, False),
        (2, False, False, False), (2, False, False, True), (2, False, True, False),
    ]:
        assert kinds.count(kind) >= 40, kind


@pytest.mark.parametrize("caption, wanted", [
    ("a photo of a dog", [{"class": "dog", "count": 1}]),
    ("a photo of four knives", [{"class": "knife", "count": 4}]),
    ("a photo of an orange traffic light",
     [{"class": "traffic light", "count": 1, "color": "orange"}]),
    ("a photo of an orange", [{"class": "orange", "count": 1}]),
    ("a photo of a computer mouse and two benches",
     [{"class": "mouse", "count": 1}, {"class": "bench", "count": 2}]),
    ("A photo of a red bus above a TV remote",
     [{"class": "remote", "count": 1},
      {"class": "bus", "count": 1, "color": "red", "position": ["above", 0]}]),
])
def test_requirements_by_hand(caption, wanted):
    assert requirements(caption) == wanted


GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


def genevals_prompts():
    """All prompts that GenEval's six templates can make of one object, and what each asks for.

    Its plural adds "es" to a name in s, and "s" to any other.  Its article looks at the first
    letter.  Where the template has two objects, the second is always a dog.  (GenEval's 553 prompts
    are a random choice, with random second objects.)"""
    prompts = {}
    for coco in coco_objects():
        name = GENEVAL_NAMES.get(coco, coco)
        article = "an" if name[0] in "aeiou" else "a"
        plural = name + ("es" if name[-1] == "s" else "s")
        one = {"class": coco, "count": 1}
        prompts[f"a photo of {article} {name}"] = [one]
        for number, count in (("two", 2), ("three", 3), ("four", 4)):
            prompts[f"a photo of {number} {plural}"] = [{"class": coco, "count": count}]
        dog = {"class": "dog", "count": 1}
        prompts[f"a photo of {article} {name} and a dog"] = [one, dog]
        for place in ("left of", "right of", "above", "below"):
            placed = one | {"position": [place, 0]}
            prompts[f"a photo of {article} {name} {place} a dog"] = [dog, placed]
        for colour in captions.COLOUR_NAMES:
            a = "an" if colour == "orange" else "a"
            coloured, red_dog = one | {"color": colour}, dog | {"color": "red"}
            prompts[f"a photo of {a} {colour} {name}"] = [coloured]
            prompts[f"a photo of {a} {colour} {name} and a red dog"] = [coloured, red_dog]
    return prompts


def test_all_of_genevals_prompts_are_understood():
    """Its plurals are mechanical: "two toothbrushs", "three persons", "two sheeps"."""
    prompts = genevals_prompts()
    assert len(prompts) == 80 * (1 + 3 + 1 + 4 + 20)
    for prompt, wanted in prompts.items():
        assert requirements(prompt) == wanted, prompt


@pytest.mark.parametrize("right, mechanical", [
    ("benches", "benchs"), ("people", "persons"), ("sheep", "sheeps"), ("skis", "skises"),
    ("knives", "knifes"), ("sandwiches", "sandwichs"), ("scissors", "scissorses"),
    ("toothbrushes", "toothbrushs"), ("computer mice", "computer mouses"), ("buses", "buses"),
])
def test_the_right_plural_is_as_good_as_genevals(right, mechanical):
    assert requirements(f"two {right}") == requirements(f"two {mechanical}")
    assert any(captions.plural(GENEVAL_NAMES.get(name, name)) == right for name in coco_objects())


@pytest.mark.parametrize("caption", [
    "a photo of a unicorn", "a photo of five dogs", "a dog near a cat", ""])
def test_captions_that_are_no_composition(caption):
    with pytest.raises(ValueError, match="as a composition"):
        requirements(caption)


# --- encoding --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A folder like google/flan-t5-xl's: a random T5 of one layer, 6 numbers a word, few words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = ["<pad>", "</s>", "<unk>", "a", "red", "bird", "two", "dogs", "photo", "of"]
    numbered = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbered, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("t5")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=6, d_kv=3, d_ff=8, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


CAPTIONS = ["a red bird", "two dogs", "a photo of a red bird", "two dogs"]
LENGTH = 8


def test_captions_are_padded_on_the_left_with_zeros(t5_folder):
    prompts = T5Captions(str(t5_folder), length=LENGTH)(CAPTIONS)
    cond, mask = prompts.pick(torch.tensor([1, 2]), torch.device("cpu"))
    assert prompts.texts[1] == "two dogs" and cond.shape == (2, LENGTH, 6)
    assert mask.sum(dim=1).tolist() == [3, 7]              # the words and T5's end mark
    assert mask[0].tolist() == [False] * 5 + [True] * 3
    assert (cond[~mask] == 0).all() and (cond[mask] != 0).any(dim=-1).all()


def test_features_are_those_of_the_caption_alone(t5_folder):
    """Neither the batch's padding nor the cache of equal captions changes them."""
    encode = T5Captions(str(t5_folder), length=LENGTH, batch=3)
    prompts = encode(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        input_ids = encode.tokenizer(caption, return_tensors="pt").input_ids
        with torch.no_grad():
            alone = encode.model(input_ids=input_ids).last_hidden_state[0]
        cond, _ = prompts.pick(torch.tensor([i]), torch.device("cpu"))
        torch.testing.assert_close(cond[0, -len(alone):], alone)


def test_each_distinct_caption_is_encoded_once(t5_folder):
    encode, seen = T5Captions(str(t5_folder), length=LENGTH, batch=2), []

    def count(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
    encode.model.register_forward_pre_hook(count, with_kwargs=True)
    encode(CAPTIONS * 5)
    encode(["two dogs", "a dog"])
    assert seen == [2, 1, 1]


def test_a_long_caption_is_cut_and_counted(t5_folder):
    with pytest.warns(UserWarning, match="1 of 2 captions are longer than 8 tokens"):
        prompts = T5Captions(str(t5_folder), length=LENGTH)(["a " * 20, "a bird"])
    assert prompts.cond_mask.sum(dim=1).tolist() == [8, 3]


def test_encoded_captions_condition_the_model(t5_folder):
    """The whole way: words, features, left padding, both branches of guidance."""
    prompts = T5Captions(str(t5_folder), length=LENGTH)(CAPTIONS)
    model = tiny_model("t2i", cls_token_num=LENGTH, caption_dim=6)
    cond, mask = prompts.pick(torch.arange(4), torch.device("cpu"))
    tokens = torch.randint(11, (1, 16)).expand(4, -1)
    logp, _ = token_logp(model, tokens, cond, mask, cfg_scale=4.0)
    torch.testing.assert_close(logp[1], logp[3])
    assert (logp[0] - logp[1]).abs().max() > 1e-3


def test_a_missing_t5_is_a_clear_error(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = "https://huggingface.co/google/flan-t5-xl .*--t5 PATH"
    with pytest.raises(FileNotFoundError, match=message):
        caption_encoder("t2i-XL-256", "google/flan-t5-xl", "cpu")


def test_a_caption_that_just_fits_is_not_reported_as_cut(t5_folder, recwarn):
    """Six words and T5's end mark are 7 tokens."""
    prompts = T5Captions(str(t5_folder), length=7)(["a photo of a red bird"])
    assert prompts.cond_mask.sum() == 7
    said = [str(w.message) for w in recwarn if "lose their end" in str(w.message)]
    assert not said, f"7 tokens fit into 7 places, and nothing is cut: {said}"
