"""Options about pairs of image and caption, and how to load what they name."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .arguments import NO_IMAGES, RETAIN_FRACTION, DataArguments

if TYPE_CHECKING:  # each takes seconds
    from datasets import Dataset

    from ..data.load import LoadedImages
    from ..data.pairs import Pairs


@dataclass
class PairArguments:
    """Which captions the images of `DataArguments` have, and what a CLIP is measured on.

    Args:
        text_column: Column with a caption for each image. Without it captions are made of class names, see `captioned`.
        zero_shot_dataset: Labelled images to measure on, where those with captions have no labels: its split as
            `DataArguments` would choose it, under the other options that are given.
    """

    text_column: str | None = field(default=None, metadata={"help": "Column with captions; else made of class names."})
    zero_shot_dataset: str | None = field(
        default=None, metadata={"help": "Labelled images to measure on, where those with captions have none."}
    )

    def load(self, data_args: DataArguments) -> tuple["LoadedImages", "Pairs"]:
        """Load pairs to train on, and labelled images to measure on.

        Returns:
            The images as `DataArguments.load` gives them, of ``zero_shot_dataset`` where that is measured on; and the retain
            set with captions.

        Raises:
            ValueError: There are neither captions nor class names; no such column; captions without labels and nothing else to
                measure on; or see `DataArguments.load`.
        """
        if self.text_column is not None:
            return self._of_column(data_args)
        from ..data import pairs
        from ..data.images import RawImages

        if self.zero_shot_dataset is not None:
            raise ValueError("zero_shot_dataset is for captions without labels: give --text_column, or leave it out")
        images = data_args.load()
        names, count = images.retain.features["label"].names, len(images.retain) + len(images.rest)
        pairs.check_named(names)
        if 2 * len(names) > count:
            raise ValueError(
                f"{count} images of {len(names)} classes: are the names captions, name their column by --text_column"
            )
        return images, pairs.captioned(RawImages.from_dataset(images.retain), data_args.retain_seed)

    def _of_column(self, data_args: DataArguments) -> tuple["LoadedImages", "Pairs"]:
        from ..data import pairs, sources

        if data_args.dataset_name is None:
            raise ValueError(NO_IMAGES)
        found = sources.open_source(data_args.dataset_name, configuration=data_args.dataset_config)
        if data_args.train_split not in found:
            raise ValueError(f"{data_args.dataset_name} has no split {data_args.train_split!r}; it has {', '.join(found)}")
        split = found[data_args.train_split]
        text = pairs.text_column(split.features, self.text_column)
        if self.zero_shot_dataset is not None:
            retain = _drawn(data_args, split, sources.image_column(split.features, data_args.image_column), text)
            images = replace(_measured(data_args, self.zero_shot_dataset), retain=retain, source=data_args.dataset_name)
        elif data_args.label_column is not None or sources.has_class_labels(split.features):
            images = data_args.load()
            retain = images.retain.add_column("text", list(split.select(list(images.retain["index"]))[text]))
        else:
            raise ValueError(
                f"{data_args.dataset_name} has captions and no labels (ClassLabel) to measure by: name labelled images, "
                "--zero_shot_dataset, or its label column"
            )
        pairs.check_named(images.test.class_names)
        return images, pairs.Pairs.from_dataset(retain)


def _measured(data_args: DataArguments, name: str) -> "LoadedImages":
    """Labelled images to measure on, of a data set of their own, which nothing else is drawn from."""
    own = {"dataset_config": None, "image_column": None, "label_column": None, "retain_count": None, "retain_fraction": None}
    return replace(data_args, dataset_name=name, **own).load()


def _drawn(data_args: DataArguments, split: "Dataset", image: str, text: str) -> "Dataset":
    """The rows of the retain set, of a split with captions and without labels."""
    from ..data.load import retain_split
    from ..data.pairs import unlabelled_pairs

    fraction = RETAIN_FRACTION if data_args.is_default_size else data_args.retain_fraction
    retain, _ = retain_split(unlabelled_pairs(split, image, text), fraction, data_args.retain_count, seed=data_args.retain_seed)
    return retain
