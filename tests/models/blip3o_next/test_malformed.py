"""Model folders from anywhere: each draws finite pixels or is refused in one line, and none runs code or asks a hub."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.types import ImageRLError, Prompt, SamplingParams
from tests.micro import micro_folder
from tests.models.helpers import load_policy

FOLDERS = 170
HANGS_S = 20.0
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 64, 10**6, 10**9, 10**30),
    *(0.0, -0.5, 0.3, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *("", "silu", "hub/kernel", "../../x", "\ud83d", [], {}, [0], [1] * 5, [[]], {"a": 1}),
)
FOREIGN = {
    "attn_implementation": "hub/kernel",
    "_attn_implementation": "hub/kernel",
    "experts_implementation": "hub/kernel",
    "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "_name_or_path": "owner/model",
    "torch_dtype": "float128",
    "trust_remote_code": True,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with traps in it: a module and a pickle that leave a file behind when they are run."""
    folder = micro_folder(tmp_path_factory.mktemp("sound") / "model")
    mark = folder.parent / "was run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")

    class Trap:
        def __reduce__(self) -> Any:
            return open, (str(mark), "w")

    for name in ("pytorch_model.bin", "tokenizer.pkl", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, sound: Path) -> Iterator[None]:
    """No network, nothing run, no waiting."""

    def refuse(*arguments: Any, **_: Any) -> Any:
        pytest.fail(f"reached for {arguments[1:]}", pytrace=True)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch, "load", refuse)

    def too_long(*_: Any) -> None:
        pytest.fail(f"takes more than {HANGS_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert not (sound.parent / "was run").exists()


def outcome(folder: Path) -> str:
    """What comes of a folder: "" for finite pixels, else the one line that it is refused with."""
    signal.setitimer(signal.ITIMER_REAL, HANGS_S)
    try:
        policy, config = load_policy(str(folder))
        sampling = SamplingParams(guidance=config["sampling"]["guidance"], flow_steps=2)
        rollout = RolloutEngine(policy, sampling, 0, torch.no_grad)
        (groups,) = rollout.generate([Prompt(0, "a sign")], 1, "try")
        assert groups[0].images.size and torch.isfinite(groups[0].rollout_logprobs).all()
    except ImageRLError as error:
        message = str(error)
        assert "\n" not in message and 0 < len(message) < 600, message
        return message
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


# ---- ways to spoil a folder --------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path below a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


def spoil_json(file: Path, rng: random.Random) -> str:
    """One value of a document changed, taken away or added."""
    document = json.loads(file.read_text())
    *above, key = rng.choice(list(places(document)))
    parent = document
    for step in above:
        parent = parent[step]
    way = rng.choice(("set", "set", "set", "scale", "remove", "add"))
    if way == "scale" and isinstance(parent[key], int | float):
        parent[key] = parent[key] * rng.choice((-1, 2, 1000, 10**9)) if parent[key] else 1
    elif way == "remove":
        del parent[key]
    elif way == "add" and isinstance(parent, dict):
        key = rng.choice(list(FOREIGN))
        parent[key] = FOREIGN[key]
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    file.write_text(json.dumps(document))
    return f"{file.name}: {way} {[*above, key]}"


def spoil_text(file: Path, rng: random.Random) -> str:
    """A text file cut, garbled or replaced."""
    data = file.read_bytes()
    ways: dict[str, bytes] = {
        "cut": data[: rng.randrange(len(data))],
        "empty": b"",
        "deep": b'{"qwen3": ' + b"[" * 100_000,
        "twice": data.replace(b"{", b'{"qwen3": null, "version": null, "chat_template": 1, ', 1) + b" ",
        "bytes": bytes(rng.randrange(256) for _ in range(200)),
        "digits": b'{"qwen3": %s}' % (b"9" * 5000),
        "list": b"[" + data + b"]",
        "half": data.replace(b'": ', b'\\ud83d": ', 1),
    }
    way = rng.choice(list(ways))
    file.write_bytes(ways[way])
    return f"{file.name}: {way}"


def stored(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def store(file: Path, header: Any, numbers: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def spoil_tensors(file: Path, rng: random.Random) -> str:
    """Weights whose header lies, or whose numbers are no numbers."""
    header, numbers = stored(file)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    entry = header[name]
    start, stop = entry["data_offsets"]
    way = rng.choice(
        (
            *("drop", "rename", "overlap", "swap", "int", "dtype", "shape", "huge shape", "negative"),
            *("nan", "inf", "huge", "cut", "longer", "garbage", "length", "null", "floats"),
        )
    )
    fillers = {"nan": math.nan, "inf": math.inf, "huge": 3e38}
    if way == "drop":
        del header[name]
    elif way == "rename":
        header[rng.choice(("", "model.x", name + ".weight", "../x"))] = header.pop(name)
    elif way == "overlap":
        header[other] = {**entry}
    elif way == "swap":
        header[name], header[other] = header[other], entry
    elif way == "int":
        entry["dtype"] = "I32"
    elif way == "dtype":
        entry["dtype"] = rng.choice(("F16", "F64", "BOOL", "F8_E4M3", "", None, 7))
    elif way == "shape":
        entry["shape"] = rng.choice(([], [0], entry["shape"][::-1], [*entry["shape"], 1], [True], None, "x"))
    elif way == "huge shape":
        entry["shape"] = [10**9, 10**9]
    elif way == "negative":
        entry["data_offsets"] = [-start, -stop]
    elif way == "floats":
        entry["data_offsets"] = [float(start), stop + 0.5]
    elif way == "null":
        header[name] = rng.choice((None, [], {}, 1))
    elif way in fillers and entry["dtype"] == "F32":
        filled = struct.pack("<f", fillers[way]) * ((stop - start) // 4)
        numbers = numbers[:start] + filled + numbers[stop:]
    elif way == "cut":
        numbers = numbers[: rng.randrange(len(numbers))]
    elif way == "longer":
        numbers += b"\0" * 64
    store(file, header, numbers)
    if way == "garbage":
        file.write_bytes(bytes(rng.randrange(256) for _ in range(300)))
    elif way == "length":
        file.write_bytes(struct.pack("<Q", rng.choice((0, 1, 10**6, 2**63))) + file.read_bytes()[8:])
    return f"{file.name}: {way} {name}"


def spoil_index(file: Path, rng: random.Random) -> str:
    """Shards that are not there, or elsewhere."""
    names = [name for name in stored(file)[0] if name != "__metadata__"]
    maps: list[Any] = [
        {},
        None,
        dict.fromkeys(names, "/etc/passwd"),
        dict.fromkeys(names, "../model.safetensors"),
        {name: rng.choice(("model.safetensors", "other.safetensors")) for name in names},
        dict.fromkeys(names, 7),
        {**dict.fromkeys(names, file.name), "model.more": file.name},
    ]
    shutil.copy(file, file.with_name("other.safetensors"))
    choice = rng.randrange(len(maps))
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": maps[choice]}))
    return f"index: {choice}"


def spoil_presence(file: Path, rng: random.Random) -> str:
    """A file that is gone, a folder, or a loop of links."""
    file.unlink()
    way = rng.choice(("gone", "folder", "loop"))
    if way == "folder":
        file.mkdir()
    elif way == "loop":
        file.symlink_to(file.name)
    return f"{file.name}: {way}"


Spoil = Callable[[Path, random.Random], str]
WAYS: tuple[tuple[Spoil, str, int], ...] = (
    (spoil_json, "config.json", 12),
    (spoil_json, "tokenizer_config.json", 2),
    (spoil_json, "tokenizer.json", 2),
    (spoil_text, "config.json", 2),
    (spoil_text, "tokenizer.json", 1),
    (spoil_text, "tokenizer_config.json", 1),
    (spoil_text, "chat_template.jinja", 1),
    (spoil_tensors, "model.safetensors", 8),
    (spoil_index, "model.safetensors", 1),
    (spoil_presence, "config.json", 1),
    (spoil_presence, "tokenizer.json", 1),
    (spoil_presence, "model.safetensors", 1),
)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FOLDERS))
@pytest.mark.usefixtures("alone")
def test_any_folder_draws_or_is_refused(sound: Path, tmp_path: Path, number: int) -> None:
    rng = random.Random(number)
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    spoil, name, _ = rng.choices(WAYS, [weight for *_, weight in WAYS])[0]
    what = spoil(folder / name, rng)
    print(what, "->", outcome(folder) or "draws")


# ---- what was found ----------------------------------------------------------------------------------------


def config_with(path: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        *above, key = path.split(".")
        parent = config
        for step in above:
            parent = parent[step]
        parent[key] = value
        file.write_text(json.dumps(config))

    return spoil


def header_with(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        header, numbers = stored(folder / "model.safetensors")
        change(header)
        store(folder / "model.safetensors", header, numbers)

    return spoil


def numbers_with(name: str, value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        header, numbers = stored(folder / "model.safetensors")
        start, stop = header[name]["data_offsets"]
        filled = struct.pack("<f", value) * ((stop - start) // 4)
        store(folder / "model.safetensors", header, numbers[:start] + filled + numbers[stop:])

    return spoil


NORM, OTHER = "model.norm.weight", "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (config_with("qwen3", None), '"qwen3" should be'),
        (config_with("qwen3.num_attention_heads", 0), '"qwen3.num_attention_heads" should be greater'),
        (config_with("qwen3.num_key_value_heads", 3), "cannot share 3 num_key_value_heads evenly"),
        (
            config_with("qwen3.max_position_embeddings", 10**9),
            '"qwen3.max_position_embeddings" should be less',
        ),
        (config_with("num_image_positions", 10**9), '"num_image_positions" should be less'),
        (config_with("qwen3.rms_norm_eps", math.nan), "a number is not finite"),
        (config_with("vae.scaling_factor", math.nan), "a number is not finite"),
        (config_with("vae.scaling_factor", 0.0), '"vae.scaling_factor" should be greater'),
        (config_with("qwen3.attn_implementation", "hub/kernel"), '"qwen3.attn_implementation" is no setting'),
        (config_with("qwen3.attention_bias", True), '"qwen3.attention_bias" should be false'),
        (config_with("sana.timestep_scale", 0.5), '"sana.timestep_scale" should be'),
        (config_with("image_end_token_id", 10**6), "is beyond qwen3.vocab_size"),
        (config_with("latent_size", [4096, 4096]), "pictures of more than"),
        (header_with(lambda header: header.update({NORM: header[OTHER]})), "does not begin where"),
        (header_with(lambda header: header[NORM].update(dtype="I32")), "is stored as torch.int32"),
        (numbers_with(NORM, math.nan), "model.norm.weight holds numbers that are not finite"),
        (numbers_with(NORM, 3e38), "the model draws pixels that are not finite"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_what_was_found(sound: Path, tmp_path: Path, spoil: Callable[[Path], None], refusal: str) -> None:
    """Each was a traceback, a wait, or pictures of NaN in silence."""
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    spoil(folder)
    assert refusal in outcome(folder)
