"""A byte-level BPE tokenizer: lossless for any UTF-8, with a beginning and an end of text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def train(texts, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    for sample in (text, " two  spaces\n\ttab\r\n", "naïve Ωmega 漢字 🙂\u200d\x00", ""):
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != sample:
            raise SystemExit(f"the tokenizer does not round-trip {sample[:40]!r}")
