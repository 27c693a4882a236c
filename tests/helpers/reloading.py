"""Whether a classifier's folder gives the classifier."""

import torch
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from d3_hf.models import load_classifier
from d3_hf.models.shared import state_to_save
from d3_hf.models.source import preprocessing_of


def assert_reloads(model, folder):
    """Save a classifier as the trainers do, load the folder, and compare weights, buffers and logits."""
    model.save_pretrained(folder, state_dict=state_to_save(model))
    if not isinstance(model.image_processor, TimmWrapperImageProcessor):
        model.image_processor.save_pretrained(folder)
    again = load_classifier(folder)
    for one, other in zip(tensors(model), tensors(again), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]), one[0]
    pixels = torch.randn(2, 3, *preprocessing_of(model).size)
    with torch.no_grad():
        expected, found = model(pixel_values=pixels).logits, again(pixel_values=pixels).logits
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # memory that lies otherwise is summed otherwise


def tensors(model):
    """Parameters and buffers by name, those that no file holds too."""
    return [*model.named_parameters(), *model.named_buffers()]
