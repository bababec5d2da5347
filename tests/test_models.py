"""What a user reads when a checkpoint cannot be loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orpo_distill.errors import ModelError
from orpo_distill.models import checkpoint_folder, load_model, load_tokenizer, pick_device, restore
from tests.checkpoints import save_tiny_checkpoint


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_a_checkpoint_loads_in_the_type_asked_for(tmp_path: Path) -> None:
    folder = str(save_tiny_checkpoint(tmp_path))
    assert load_model(folder, device="cpu").dtype is torch.float32
    model = load_model(folder, dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    assert not model.training
    assert load_tokenizer(folder).eos_token == "<eos>"


def test_half_precision_checkpoints_are_float32_on_a_cpu(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    load_model(str(folder)).half().save_pretrained(folder)
    assert load_model(str(folder), device="cpu").dtype is torch.float32


@pytest.mark.parametrize("name", ["./missing", "../missing/folder", "/missing/folder", "a/b/c", "with space"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=f"found nothing at {name}; check the path"):
        load_model(name)


def test_a_hub_id_is_not_taken_for_a_path() -> None:
    assert checkpoint_folder("some-lab/model-1.5B") is None
    assert checkpoint_folder("gpt2") is None


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    script = (
        "from orpo_distill.models import load_model, ModelError\n"
        "try: load_model('some-lab/some-model')\n"
        "except ModelError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("expected a model at some-lab/some-model, found: ")
    assert "check the name and the network" in done.stdout


def test_a_folder_without_a_config_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"found no config\.json"):
        load_tokenizer(str(tmp_path))
    folder = save_tiny_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="give the folder it is in"):
        load_model(str(weights(folder)))


def test_damaged_weights(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    weights(folder).write_bytes(weights(folder).read_bytes()[:1000])
    with pytest.raises(ModelError, match="undamaged"):
        load_model(str(folder))


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    tensors = load_file(weights(folder))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder))


def test_remote_code_has_to_be_trusted(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    with pytest.raises(ModelError, match="set trust_remote_code: true"):
        load_model(str(folder))


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="give a causal language model's folder"):
        load_model(str(tmp_path))


def test_an_adapter_without_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="expected base_model_name_or_path"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/missing/base"}))
    with pytest.raises(ModelError, match="found nothing at /missing/base"):
        load_tokenizer(str(tmp_path))


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="use `device: auto`"):
        pick_device("no-such-device")
    assert pick_device("cpu") == "cpu"


def test_restoring_puts_back_every_weight_also_renamed_ones(tmp_path: Path) -> None:
    """Files of GPT-NeoX call its head otherwise, those of Mixtral its experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    for kind in ("gpt_neox", "mixtral", "llama"):
        config = AutoConfig.for_model(kind, **small, **(heads if kind == "mixtral" else {"num_attention_heads": 2}))
        saved, other = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
        saved.save_pretrained(tmp_path / kind)
        restore(other, str(tmp_path / kind))
        wanted = saved.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in other.state_dict().items()), kind
