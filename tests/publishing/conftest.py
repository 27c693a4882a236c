"""A Hub for this process, and the folder of a purified model to push to it."""

import huggingface_hub
import pytest
from fake_hub import FakeHub
from hub_session import FAST, TOKEN
from tiny import tiny_samples, tiny_vit

from d3_hf import D3Config, D3Trainer
from d3_hf.publishing import hub as pushing


@pytest.fixture
def own_hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, without waiting between retries."""
    with FakeHub(TOKEN) as hub:
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr(pushing, "TIMEOUT", 0.3)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def purified(tmp_path_factory):
    """A purified model's folder, with things beside it that nobody should get."""
    folder = tmp_path_factory.mktemp("purified") / "run"
    options = dict(save_strategy="steps", save_steps=1, **FAST)
    trainer = D3Trainer(tiny_vit(), D3Config(str(folder), **options), tiny_samples())
    trainer.train()
    trainer.save_model()
    for name in ("training_args.bin", "weights.pth", "notes.txt", ".env", "other.safetensors", "path.png"):
        (folder / name).write_text(TOKEN)
    return folder
