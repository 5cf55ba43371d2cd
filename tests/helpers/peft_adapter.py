"""A small PEFT adapter on the disk, and what the converter says of it."""

import json

import pytest

from emollama_jax import imported
from emollama_jax.errors import UserError
from tests.helpers.torch_checkpoints import convert, save, toy, write


def refused(folder, out, model, source="peft") -> str:
    """The one line of the error."""
    with pytest.raises(UserError) as error:
        convert(source, folder, out, model)
    assert "\n" not in str(error.value), error.value
    assert not out.exists()
    return str(error.value)


def notes(folder) -> str:
    return "\n".join(imported.read_manifest(folder).notes)


def rewritten(folder, change):
    """Changes an adapter's tensors."""
    from safetensors.numpy import load_file

    file = folder / "adapter_model.safetensors"
    save(change(load_file(file)), file)


def small_model():
    """The toy model with an adapter on two projections."""
    return toy("llama.lora.targets=[q_proj, v_proj]")


def write_adapter(folder, model):
    """Writes an adapter; gives a function that changes its settings and returns the folder."""
    write("peft", folder, model)
    path = folder / "adapter_config.json"

    def change(**settings):
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return change
