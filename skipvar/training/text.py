"""The embedded model's tokenizer and its tiny T5 encoder.

The tokenizer knows the captions' words as whole tokens and spells everything else in bytes, so that every prompt
encodes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from skipvar.training.backgrounds import BACKGROUNDS, places
from skipvar.training.data import LAYOUT_SIDES, subjects
from skipvar.training.objects import OBJECTS
from skipvar.training.recipe import MODEL, TextRecipe

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
_CONTINUATION = "##"
_MAX_WORD_BYTES = 32


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the captions, then single bytes, at the start of a word and inside; `</s>` at the end, kept.

    WordPiece takes the longest known piece first: `cats` is `cat` + `s` where only `cat` is known.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    words = ["".join(part for part, _ in byte_level.pre_tokenize_str(word)) for word in _caption_words()]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [PAD, END, UNKNOWN, *words, *letters, *(_CONTINUATION + letter for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.WordPiece(
            vocabulary,
            unk_token=UNKNOWN,
            continuing_subword_prefix=_CONTINUATION,
            max_input_chars_per_word=_MAX_WORD_BYTES,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # Matching a word against the vocabulary takes time quadratic in its length, so long ones are cut first.
    cut = pre_tokenizers.Split(Regex(f".{{1,{_MAX_WORD_BYTES}}}"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, cut])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_CONTINUATION, ""), decoders.Fuse(), decoders.ByteLevel()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MODEL.transformer.text_max_tokens,
    )


def _caption_parts() -> tuple[list[str], list[str]]:
    """Every (subject, place) that captions are put together from."""
    before = [text for o in range(len(OBJECTS)) for layout in range(len(LAYOUT_SIDES)) for text in subjects(o, layout)]
    return before, [place for background in BACKGROUNDS for place in places(background)]


def _caption_words() -> list[str]:
    before, after = _caption_parts()
    return sorted({"on", *(word for text in before + after for word in text.split())})


def build_text_encoder(recipe: TextRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> T5EncoderModel:
    """A fresh `T5EncoderModel` of the embedded model's size.

    Pieces that no caption uses start, and so stay, at zero: a word that means nothing should disturb nothing. Forms of
    one word start alike, so that what is learned of one at first holds for all.
    """
    width = MODEL.transformer.text_width
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // recipe.num_heads,
        d_ff=recipe.hidden_width,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = T5EncoderModel(config)
    used = torch.zeros(len(tokenizer), dtype=torch.bool)
    for ids in tokenizer(_caption_words())["input_ids"]:
        used[ids] = True
    embeddings = encoder.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[~used] = 0
        for word, model in _synonyms().items():
            rows = tokenizer([word, model], add_special_tokens=False)["input_ids"]
            embeddings[rows[0]] = embeddings[rows[1]]
    return encoder


def _synonyms() -> dict[str, str]:
    """Word to the word whose vector it starts from: plurals, numerals and other names in one word of an object."""
    result = {"4": "four", "9": "nine", "stripes": "striped", "dots": "dotted", "checks": "checked"}
    result["checkered"] = "checked"
    for names in OBJECTS.values():
        for singular, plural in names:
            result |= {b: a for a, b in zip(singular.split(), plural.split(), strict=False) if a != b}
        usual = names[0][0]
        if " " not in usual:
            result |= {form: usual for pair in names[1:] for form in pair if " " not in form and form != usual}
    return result


def match_embeddings(
    embeddings: Tensor, tokenizer: PreTrainedTokenizerFast, known: Tensor, vocabulary: dict[str, int]
) -> None:
    """Gives `embeddings (pieces, width)` the `known` vectors of another `vocabulary` (piece to row), in place.

    A word that the other did not know starts as the word that it is a form of, if that was known; else it keeps its
    fresh vector.
    """
    pieces = tokenizer.get_vocab()
    for piece, row in pieces.items():
        if piece in vocabulary:
            embeddings[row] = known[vocabulary[piece]]
    for pair in _synonyms().items():
        word, model = (tokenizer.tokenize(text)[0] for text in pair)
        if word not in vocabulary and model in vocabulary:
            embeddings[pieces[word]] = known[vocabulary[model]]


def save_text_encoder(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in half precision, configuration and tokenizer in one folder, as `transformers` loads them."""
    disable_progress_bar()
    encoder.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class CaptionTokens:
    """Token ids of training captions."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        before, after = _caption_parts()
        num_words = max(len(text.split()) for text in before) + 1 + max(len(text.split()) for text in after)
        self.max_length = num_words + 1
        """Of any caption, end token included: a caption's words are whole tokens."""

    def batch(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Ids int64 `(B, T)` padded with 0 to the longest of them, and the real lengths."""
        batch = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"].sum(dim=1).tolist()


def encode_captions(encoder: T5EncoderModel, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden state `(B, T, text_width)` of padded ids; padding is masked out and its rows carry no meaning."""
    mask = torch.arange(ids.shape[1], device=ids.device)[None, :] < torch.tensor(lengths, device=ids.device)[:, None]
    return encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
