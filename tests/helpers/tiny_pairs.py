"""A tiny CLIP with a tokenizer of words, made offline, for the tests."""

from tiny import PROCESSOR, with_processor
from tiny_encoders import LAYERS, NAMES, VIT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, set_seed

WORDS = [
    "<pad>",
    "<unk>",
    "<start>",
    "<end>",
    *"a an the photo picture image of blurry bright dog cat big small".split(),
    *NAMES,
]
UNIT = 8  # width of the shared features


def tiny_tokenizer():
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    )


def tiny_pair(seed=0):
    """A whole CLIP whose towers tell images and texts apart."""
    set_seed(seed)
    spread = dict(initializer_factor=8.0)
    text = LAYERS | dict(vocab_size=len(WORDS), max_position_embeddings=12, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    model = CLIPModel(CLIPConfig(vision_config=VIT | spread, text_config=text | spread, projection_dim=UNIT))
    model.tokenizer = tiny_tokenizer()
    return with_processor(model)


def write_pair(folder, model=None):
    model = model or tiny_pair()
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return str(folder)
