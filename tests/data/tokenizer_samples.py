"""Tiny tokenizers and odd strings for the tests."""
import io
import random

WORDS = ("a small red circle", "the blue square is left of a star", "Was ist das? Ein Dreieck!",
         "naïve café", "月 と 星", "don't stop, it's 42.5 %", "x = y\n\tz  ")
ODD = ("", " ", "\n", "\t \r\n", "🦊", "👩🏽‍🚀 astronaut", "שלום עולם", "عالم\u200f \u202bx", "a\u0000b", "\x01\x1b[31m", "\ufeffbom", "e\u0301", "ﬁ",
       "Ａ１", "\u2028", "\u00a0x\u3000y",
       "\U0010ffff", "\ue000", "𝔘𝔫𝔦", "<s></s>", "<pad>", "<extra_id_0>", "<loc0001>", "▁a ▁", "Ġ", "a" * 300,
       "🏳️‍🌈" * 9, "क्षि", "ﷺ", "İi̇", "ẞß", "…—\u00ad", "  two  spaces  ")


def sentencepiece_model(model_type="unigram", vocab_size=400, **settings):
    """Bytes of a SentencePiece model; Gemma's kind with identity normalisation where asked for."""
    import sentencepiece
    buffer = io.BytesIO()
    defaults = dict(byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, num_threads=1, minloglevel=2, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(WORDS * 3), model_writer=buffer, vocab_size=vocab_size, model_type=model_type,
                                             **{**defaults, **settings})
    return buffer.getvalue()


def gemma_model():
    """A model as Gemma's: nothing is normalised, no space is put in front, a newline is a piece, begin and end marks."""
    return sentencepiece_model("bpe", 360, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                               user_defined_symbols=["\n", "\n\n"])


def byte_level():
    """A trained byte-level byte-pair tokenizer of the tokenizers library, as GPT-2's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>", "<|user|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return tokenizer


def metaspace():
    """A trained unigram tokenizer with metaspaces, normalisation and a byte fallback-less unknown token, as T5's."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)  # noqa: S106
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return tokenizer


def word_piece():
    """A trained word-piece tokenizer, as BERT's."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False)
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return tokenizer


def odd_strings(count, seed=0):
    """Strings out of all planes of Unicode, mixed with words, marks and odd ones."""
    rng, strings = random.Random(seed), list(ODD)
    ranges = ((32, 127), (0, 32), (160, 0x250), (0x370, 0x800), (0x900, 0xe00), (0x2000, 0x2070), (0x3040, 0x3100), (0x4e00, 0x5000), (0xff00, 0xfff0),
              (0x1f300, 0x1fa00), (0xe000, 0xe010), (0x1d400, 0x1d500))
    while len(strings) < count:
        parts = []
        for _ in range(rng.randrange(1, 7)):
            low, high = rng.choice(ranges)
            parts.append(rng.choice((rng.choice(WORDS), rng.choice(ODD), "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 8))), " ")))
        strings.append(rng.choice(("", " ")).join(parts))
    return strings
