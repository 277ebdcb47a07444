"""Convert old Hugging Face checkpoints with pickled weights to safetensors, the only format that training reads."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from distill_nemo.hub import SAFETENSORS, hub_name, pickles_of, recorded_name
from distill_nemo.models.checkpoints.export_files import tokenizer_files, write_files
from distill_nemo.models.checkpoints.huggingface import check_target
from distill_nemo.models.checkpoints.pretrained import open_pretrained
from distill_nemo.runtime.files import writing_directory
from distill_nemo.runtime.output_lock import OutputLock


def convert(checkpoint: str, output: str, allow_pickle: bool = False) -> None:
    """Write the pickled weights of `checkpoint`, with its configuration and tokenizer, as safetensors.

    torch opens them with its restricted unpickler, which admits only tensors. It has had holes, hence `allow_pickle`.

    Raises:
        ValueError: without `allow_pickle`, or if there is nothing to convert, the weights do not fit the configuration,
            or a pickle names anything but tensors; for a name on the hub, as `hub.pickles_of`.
    """
    target = Path(output).resolve()
    if hub_name(checkpoint) is None:
        _check_pickled(Path(checkpoint))
    if not allow_pickle:
        raise ValueError(
            f"the weights in {checkpoint} are pickles, which can run code when they are opened: add allow_pickle=true "
            "if you trust where they come from"
        )
    check_target(target)
    source = Path(pickles_of(checkpoint))
    _check_pickled(source)
    with OutputLock(target.with_name(f".{target.name}.lock"), f"output = {output}"):
        if target.is_dir() and any(target.iterdir()):
            raise ValueError(f"{target} exists and is not empty; name a new directory")
        _write(_opened(source), tokenizer_files(source), target)
    print(f"converted {recorded_name(str(source))} to {target}")


def _check_pickled(source: Path) -> None:
    if any((source / each).is_file() for each in SAFETENSORS):
        raise ValueError(f"{source} holds safetensors, which training reads as they are")
    if not any(source.glob("pytorch_model*.bin")) or not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no config.json and pytorch_model*.bin: there is nothing to convert")


def _write(model: Any, files: dict[str, Path], target: Path) -> None:
    """Write the model and copies of `files`. `target` appears once it is complete."""
    try:
        with writing_directory(target) as partial:
            model.save_pretrained(partial)
            write_files(files, partial)
    except (OSError, SafetensorError) as error:
        raise OSError(f"output = {target} cannot be written: {error}") from error


def _opened(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": False, "weights_only": True}
    try:
        opened = open_pretrained(AutoModelForCausalLM, source, output_loading_info=True, **options)
    except Exception as error:  # transformers and torch raise errors of any type
        raise ValueError(f"{source} was not opened: {error!r:.300}") from None
    model, info = opened
    wrong = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, keys))[:3])}" for kind, keys in info.items() if keys
    ]
    if wrong:
        raise ValueError(f"{source} does not fit its config.json: {'; '.join(wrong)}")
    return model
