"""What a push or a run leaves beside purified weights: no others, and nothing of the model before."""

import logging
import shutil

import pytest
from fake_hub import Repository
from hub_session import MODEL_FILES
from tiny import FAST, tiny_samples, tiny_vit

from d3_hf import D3Config, D3Trainer, load_classifier
from d3_hf.commands.push import run as push_command
from d3_hf.models.source import Source
from d3_hf.publishing.hub import push_folder
from d3_hf.publishing.leftovers import holds_weights, leftovers
from d3_hf.training.checkpoints import check_output

OTHERS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoints/epoch=3.ckpt",
    "coreml/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    "coreml/model.mlpackage/Manifest.json",
    "ema.pth",
    "flax_model.msgpack",
    "gguf/model-Q8_0.gguf",
    "last-checkpoint/model.safetensors",
    "last-checkpoint/optimizer.pt",
    "model-00001-of-00002.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.json",
    "model.torchscript",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/model_quantized.onnx",
    "openvino/openvino_model.bin",
    "openvino/openvino_model.xml",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "saved_model/saved_model.pb",
    "saved_model/variables/variables.data-00000-of-00001",
    "saved_model/variables/variables.index",
    "tf_model.h5",
    "Weights.PTH",
    "best.pth.tar",
)
EARLIER = ("all_results.json", "perturbation.safetensors", "processor_config.json", "model.sig", "victim.json")
KEPT = (
    ".gitattributes", "LICENSE", "examples/cat.png", "labels.json", "modeling.py", "notes.txt", "sub/config.json",
    "sub/all_results.json", "training.log", "trainer_state.json", "tokenizer.model",
)  # fmt: skip


def test_what_must_go():
    assert leftovers([*OTHERS, *EARLIER, *KEPT, *MODEL_FILES], MODEL_FILES) == sorted([*OTHERS, *EARLIER])
    assert all(map(holds_weights, OTHERS)) and not any(map(holds_weights, KEPT))


@pytest.fixture
def suspicious(own_hub, tmp_path):
    """A repository of another owner with weights in every format, and the folder of a model that was purified from it."""
    model = tiny_vit()
    model.save_pretrained(tmp_path / "model"), model.image_processor.save_pretrained(tmp_path / "model")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    own_hub.repos["them/suspicious"] = repo = Repository(private=False, commits=[])
    repo.commit(files)
    trainer = D3Trainer(load_classifier("them/suspicious"), D3Config(str(tmp_path / "run"), **FAST), tiny_samples())
    trainer.train()
    trainer.save_model()
    repo.commit(dict.fromkeys([*OTHERS, *EARLIER, *KEPT], b"{}"))  # after loading, which would refuse some of them
    (manifest := tmp_path / "run" / "purification.json").write_text(
        manifest.read_text().replace(repo.commits[0][0], repo.commits[1][0])
    )
    return tmp_path / "run"


def test_a_pull_request_deletes_all_other_weights_and_says_so(own_hub, suspicious, caplog):
    done = push_command([str(suspicious), "--hub_create_pr"])
    repo, gone = own_hub.repos["them/suspicious"], sorted([*OTHERS, *EARLIER])
    assert repo.pulled_away == [gone]
    ((_, files),) = repo.pulls
    readme = files["README.md"].decode()
    assert "## Deleted from this repository" in readme
    for said in (repo.headers[-1]["description"], done["description"], readme, caplog.text):
        assert all(name in said for name in gone) and not any(name in said for name in ("examples/cat.png", "LICENSE"))


def test_a_push_leaves_no_other_weights_either(own_hub, suspicious):
    push_folder(suspicious, "them/suspicious")
    assert set(own_hub.repos["them/suspicious"].commits[-1][1]) == {*MODEL_FILES, *KEPT}
    push_folder(suspicious, "them/suspicious")  # there is nothing to delete any more
    last = own_hub.repos["them/suspicious"]
    assert last.headers[-1]["description"] == "" and "Deleted" not in last.commits[-1][1]["README.md"].decode()


def test_where_there_is_nothing_to_delete_nothing_is_said(own_hub, purified, caplog):
    with caplog.at_level(logging.WARNING):
        push_folder(purified, "me/model")
    assert "deleted" not in caplog.text and "Deleted" not in own_hub.repos["me/model"].commits[-1][1]["README.md"].decode()


def test_a_repository_that_changes_meanwhile_is_not_written_to(own_hub, purified):
    def change(request):
        if request == "info":
            own_hub.repos["me/model"].commit({"pytorch_model.bin": b"uploaded meanwhile"})

    own_hub.before_sending = change
    with pytest.raises(OSError, match="412 Precondition Failed"):
        push_folder(purified, "me/model")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"repo": "them/suspicious"}, r"\(`hf auth login`\), or leave the repository to its owner and give --hub_create_pr. "),
        ({"create_pr": True}, r"\(`hf auth login`\). "),
    ],
)
def test_who_may_not_write_is_told_what_to_do(own_hub, suspicious, tmp_path, options, advice):
    folder = shutil.copytree(suspicious, tmp_path / "my run")
    own_hub.broken = ("commit", "403")
    with pytest.raises(
        OSError, match=f"is whole. Log in with an account that may write there {advice}Finish it with: d3-hf push"
    ):
        push_folder(folder, **options)
    with pytest.raises(OSError, match=f"d3-hf push '{folder}' --hub_"):  # as a shell takes it
        push_folder(folder, **options)


# The local folder ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_weights_is_refused_at_the_start(tmp_path, name, overwrite):
    (tmp_path / name).write_bytes(b"of an older model")
    args = D3Config(str(tmp_path), overwrite_output_dir=overwrite, **FAST)
    with pytest.raises(ValueError, match=rf"holds other weights \({name}\), .*: choose another folder, or move them away"):
        D3Trainer(tiny_vit(), args, tiny_samples())
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_checkpoint_itself_may_lie_in_the_folder(tmp_path):
    (tmp_path / "suspicious.pth").write_bytes(b"")
    source = Source("file", str(tmp_path / "suspicious.pth"))
    check_output(D3Config(str(tmp_path), **FAST), source)
    (tmp_path / "other.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(other.pth\)"):
        check_output(D3Config(str(tmp_path), **FAST), source)
