"""`load_clip`: both towers of a CLIP checkpoint, of images and of texts, with its tokenizer, by the rules of `load_classifier`.

`load_encoder` takes the image tower alone. What comes out here is a `transformers.CLIPModel` with ``image_processor``,
``tokenizer`` and ``source`` set; `AutoModel` and `AutoProcessor` reload what is saved of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BaseImageProcessor, CLIPModel, PreTrainedModel, PreTrainedTokenizerBase

from ..data.preprocessing import Preprocessing
from ..files import first_line, sha256
from .checkpoint_files import PICKLED, SAFE, TOKENIZER, read_folder, read_settings, refuse_links
from .config import read_clip_config, settle_output
from .evaluating import evaluating
from .kinds import is_clip
from .load import Loaded, check_in_memory, from_folder, from_hub, kind_of, name_of
from .probe import probe
from .processors import read_processor
from .source import attach
from .weight_names import unwrapped
from .weights import build_pretrained

PROJECTIONS = ("visual_projection.weight", "text_projection.weight")
# Whose Rust backend reads tables of words and nothing else.
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
TOKENIZER_DETOURS = ("tokenizer_file", "vocab_file", "merges_file")  # lead to files elsewhere
TEXTS = 256  # in a batch


def load_clip(
    source: str | Path | PreTrainedModel,
    *,
    image_processor: BaseImageProcessor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a whole CLIP, image tower, text tower and projections, without running code that it brings.

    Args:
        source: Hub id or folder of a `CLIPModel`, with its tokenizer; or a `CLIPModel` in memory, which is kept.
        image_processor: Processor to use in place of the source's own.
        tokenizer: Tokenizer to use in place of the source's own; needed for a model in memory that `load_clip` has not seen.
        revision: Branch, tag or commit of a Hub id.

    Returns:
        The model in float32 (one in memory keeps its type) and in evaluation mode, with the plain attributes
        ``image_processor``, ``tokenizer`` and ``source``.

    Raises:
        FileNotFoundError: See `load_classifier`.
        OSError: See `load_classifier`.
        ValueError: It is no CLIP, an encoder of images alone, or a file; a projection or another weight is missing or
            superfluous; it has no tokenizer that fits the text tower; or see `load_classifier`.
        TypeError: ``source`` is no path, id or module.
    """
    kind, name = kind_of(source), name_of(source)
    if kind in ("file", "module"):
        raise ValueError(f"{name} is a {kind}: of a CLIP the folder or the Hub id is loaded, which has its tokenizer")
    if revision is not None and kind != "hub":
        raise ValueError(f"{name}: revision cannot be set for a {kind} source, which settles it itself")
    loader = {
        "hub": partial(from_hub, revision=revision, opener=_open_folder, tokenizer=tokenizer),
        "folder": partial(_from_folder, tokenizer=tokenizer),
        "model": partial(_from_model, tokenizer=tokenizer),
    }[kind]
    model, processor, origin = loader(source, image_processor=image_processor)
    probe(model.eval(), Preprocessing.from_processor(processor), name)
    _check_texts(model, name)
    return attach(model, processor, origin)


def tokens(model: PreTrainedModel, texts: Sequence[str]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, int64 (N, longest), of texts; what is longer than the text tower reads is cut off.

    Raises:
        ValueError: The model has no tokenizer.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"{type(model).__name__} has no tokenizer: load it with d3_hf.models.load_clip")
    longest = model.config.text_config.max_position_embeddings
    # Padding has no part in a feature: it stands on the right, and no word looks there.
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def encode_texts(model: PreTrainedModel, texts: Sequence[str]) -> Tensor:
    """Features of texts as the text tower projects them, float32 (N, width) on the CPU; the model is left as it was.

    Raises:
        ValueError: A feature is not finite, or see `tokens`.
    """
    device, found = next(model.parameters()).device, []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(texts), TEXTS):
            batch = {key: value.to(device) for key, value in tokens(model, texts[start : start + TEXTS]).items()}
            found.append(model.get_text_features(**batch).pooler_output.float().cpu())
    features = torch.cat(found)
    if not features.isfinite().all():
        raise ValueError(
            f"features of texts of {type(model).__name__} are not finite (NaN or infinite): its weights are broken"
        )
    return features


def _from_folder(source: str | Path, tokenizer: PreTrainedTokenizerBase | None, **options) -> Loaded:
    model, processor, origin = from_folder(source, opener=_open_folder, tokenizer=tokenizer, **options)
    folder = Path(source).expanduser()
    digests = {name: sha256(folder / name) for name in TOKENIZER if tokenizer is None and (folder / name).is_file()}
    return model, processor, replace(origin, sha256=origin.sha256 | digests)


def _from_model(
    model: PreTrainedModel, image_processor: BaseImageProcessor | None, tokenizer: PreTrainedTokenizerBase | None
) -> Loaded:
    name = model.name_or_path or type(model).__name__
    if not is_clip(model):
        raise ValueError(f"{name} is a {type(model).__name__}, no CLIPModel with both towers and their projections")
    settle_output(model.config)
    model.tokenizer = tokenizer or getattr(model, "tokenizer", None)
    if model.tokenizer is None:
        raise ValueError(f"{name} is in memory without its tokenizer: pass one as tokenizer")
    return model, *check_in_memory(model, image_processor)


def _open_folder(
    folder: Path,
    name: str,
    image_processor: BaseImageProcessor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    formats: Iterable[str] = (SAFE, PICKLED),
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    refuse_links(folder, name)
    config = read_clip_config(folder, name)
    tokenizer = tokenizer or _read_tokenizer(folder, name)
    image_processor = image_processor or read_processor(folder, name)
    weights = unwrapped(read_folder(folder, name, formats), name)
    model, differences = build_pretrained(CLIPModel, config, weights, name)
    if lacking := [projection for projection in PROJECTIONS if projection in differences.missing]:
        raise ValueError(f"{name} has no projection ({', '.join(lacking)}): without both, images and texts are not comparable")
    differences.refuse(name)
    model.name_or_path = model.config.name_or_path = name
    model.tokenizer = tokenizer
    return model, image_processor


def _read_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, of one of the classes in `TOKENIZERS`."""
    file = folder / "tokenizer_config.json"
    settings = read_settings(file, name, "settings") if file.is_file() else {}
    kind = settings.get("tokenizer_class") or TOKENIZERS[0]
    if kind not in TOKENIZERS or settings.get("auto_map"):
        raise ValueError(f"{name}: its tokenizer, a {kind}, is not read: known are {', '.join(TOKENIZERS)}, without own code")
    if detours := [entry for entry in TOKENIZER_DETOURS if settings.get(entry)]:
        raise ValueError(f"{name}: {', '.join(detours)} in tokenizer_config.json leads to another file: remove the entry")
    if not (folder / TOKENIZER[0]).is_file():
        raise ValueError(f"{name} has no tokenizer ({TOKENIZER[0]}): put it there, or in Python pass one as tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file can fail in any way; none of them is recovered from
        raise ValueError(f"{name}: its tokenizer cannot be used ({first_line(error)}): fetch its files again") from error


def _check_texts(model: PreTrainedModel, name: str) -> None:
    """Refuse a tokenizer that is not the text tower's."""
    words, known = len(model.tokenizer), model.config.text_config.vocab_size
    if words > known:
        raise ValueError(f"{name}: the tokenizer has {words} words and the text tower {known}: it is another model's")
    if model.tokenizer.pad_token is None or model.tokenizer.padding_side != "right":
        raise ValueError(f"{name}: the tokenizer cannot fill texts up on the right (pad_token, padding_side): it is no CLIP's")
    short, long = encode_texts(model, ["a", "a photo of a dog"])
    if torch.equal(short, long):  # as where no text ends in the word that the tower reads
        raise ValueError(f"{name} gives all texts the same features: the tokenizer is not this text tower's")
